// The page of the runs: a list, and one run in three views. The address says which.
import { askJson, locked, query } from "../api.js";
import { Glyph, KeyForm, Theme } from "../controls.js";
import { asset, html, mount, useEffect, useState } from "../lib.js";
import { List } from "./list.js";
import { Run } from "./run.js";

const LIVE = 3000; // milliseconds between requests while something runs
const CALM = 20000;

/** The place that the address names: { run, view, ... }. */
const placed = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

/** Polls a path, more often while something runs, and not while the page is hidden. */
function usePolled(path, isLive) {
  const [state, setState] = useState({ path });
  useEffect(() => {
    let timer = 0;
    let closed = false;
    let looks = false;
    const look = async () => {
      clearTimeout(timer);
      if (looks) return;
      if (!document.hidden) {
        looks = true;
        const found = await askJson(path).then(
          (data) => ({ data }),
          (error) => ({ error }),
        );
        looks = false;
        if (closed) return;
        setState((before) => ({
          path,
          data: found.data ?? (before.path === path ? before.data : undefined),
          error: found.error,
        }));
        timer = setTimeout(look, found.error || isLive(found.data) ? LIVE : CALM);
      } else timer = setTimeout(look, LIVE);
    };
    look();
    document.addEventListener("visibilitychange", look); // update at once when the page is shown again
    return () => ((closed = true), clearTimeout(timer), document.removeEventListener("visibilitychange", look));
  }, [path]);
  return state.path === path ? state : { path };
}

const busyRun = (run) => run.state === "running" || run.stages.some((s) => s.share < 1);

function App() {
  const [place, setPlace] = useState(placed());
  const [key, setKey] = useState(0);
  const [isLocked, setLocked] = useState(false);
  useEffect(() => {
    const moved = (event) => {
      setPlace(placed());
      if (event.newURL) window.scrollTo(0, 0); // go() with `replace` dispatches an event without one
    };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  useEffect(() => locked.listen(() => setLocked(true)), []);
  if (isLocked) return html`<${KeyForm} onKey=${() => (setLocked(false), setKey(key + 1))} />`;
  return html`
    <div class="runs">
      <header class="bar">
        <a class="brand" href=${location.pathname}><img src=${asset("icon.svg")} alt="" />finback</a>
        <nav aria-label="Pages">
          ${document.documentElement.dataset.chat && html`<a class="button small" href="/"><${Glyph} name="chat" />Chat</a>`}
        </nav>
        <span class="spring"></span><${Theme} />
      </header>
      <main>${place.run ? html`<${One} key=${`${key}${place.run}`} place=${place} />` : html`<${All} key=${key} />`}</main>
    </div>`;
}

function All() {
  const { data, error } = usePolled("/api/runs", (all) => !all.runs.length || all.runs.some((r) => r.state === "running"));
  useEffect(() => void (document.title = "Runs · finback"), []);
  return html`<${Trouble} error=${error} />${data ? html`<${List} data=${data} />` : !error && html`<${Loading} />`}`;
}

function One({ place }) {
  const { data, error } = usePolled(query("/api/run", { run: place.run }), busyRun);
  useEffect(() => void (document.title = `${place.run} · finback`), [place.run]);
  if (error?.status === 404)
    return html`<div class="empty"><h1>No run of this name</h1><p>It may have been moved or deleted.</p><a class="button" href="#">All runs</a></div>`;
  return html`<${Trouble} error=${error} />${data ? html`<${Run} run=${data} place=${place} />` : !error && html`<${Loading} />`}`;
}

const Loading = () =>
  html`<p class="loading" role="status"><span class="dot" aria-hidden="true"></span>Reading the run folders…</p>`;

function Trouble({ error }) {
  if (!error || error.status === 404) return null;
  return html`<p class="notice bad" role="alert">${error.status === 0 ? "The server is gone. This page tries again every few seconds; what you see is its last reply." : error.message}</p>`;
}

mount(html`<${App} />`);
