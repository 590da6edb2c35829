// The chat page: a sidebar with the chats, the thread, the composer, and the settings.
import { ask, locked } from "../api.js";
import { KeyForm, useNarrow, useRemembered } from "../controls.js";
import { html, mount, useEffect, useLayoutEffect, useRef, useSignal, useState } from "../lib.js";
import { Composer } from "./composer.js";
import { Keys, useKeys } from "./keys.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Thread } from "./thread.js";
import { Top } from "./top.js";

const RETRY = 2500; // milliseconds between checks whether the server is back

function App({ store }) {
  useSignal(store);
  const narrow = useNarrow();
  const [wide, setWide] = useRemembered("sidebar", true);
  const [drawer, setDrawer] = useState(false); // the sidebar on a phone
  const [panel, setPanel] = useState(""); // settings, keys
  const composer = useRef();
  const search = useRef();
  const shown = narrow ? drawer : wide;
  const toggle = () => (narrow ? setDrawer(!drawer) : setWide(!wide));
  const leave = () => narrow && setDrawer(false);
  const wanted = useRef(false); // whether to focus the search field once it is visible
  useLayoutEffect(() => {
    if (shown && wanted.current) search.current.focus();
    wanted.current = false;
  }, [shown]);
  useKeys({
    begin: () => (store.begin(), composer.current?.focus()),
    search: () => {
      if (shown) return search.current.focus();
      wanted.current = true;
      toggle();
    },
    sidebar: toggle,
    stop: () => store.stop(),
    composer: () => composer.current?.focus(),
    help: () => setPanel("keys"),
    settings: () => setPanel("settings"),
    leave: () => (panel ? false : narrow && drawer ? (setDrawer(false), true) : false),
    isBusy: () => store.busy,
  });
  const title = Object.keys(store.chat.nodes).length ? `${store.chat.title} · finback` : "finback";
  useEffect(() => void (document.title = title), [title]);
  useEffect(() => locked.listen(() => ((store.server = "locked"), store.notify())), []);
  useEffect(() => {
    if (store.server !== "gone") return;
    const timer = setInterval(
      () =>
        ask("/health").then(
          () => store.connect(),
          () => {},
        ),
      RETRY,
    );
    return () => clearInterval(timer);
  }, [store.server]);
  if (store.server === "locked")
    return html`<${KeyForm} onKey=${() => ((store.server = "loading"), store.notify(), store.connect())} />`;
  return html`
    <div class=${`chat ${shown ? "with-sidebar" : ""}`}>
      <${Sidebar} store=${store} shown=${shown} search=${search} onLeave=${leave} narrow=${narrow} />
      ${narrow && shown && html`<button type="button" class="veil" aria-label="Close the sidebar" onClick=${toggle}></button>`}
      <div class="room" inert=${narrow && shown}>
        <${Top} store=${store} shown=${shown} onSidebar=${toggle} onPanel=${setPanel} />
        <${Thread} store=${store} key=${store.chat.id} />
        <${Composer} store=${store} field=${composer} />
      </div>
      ${panel === "settings" && html`<${Settings} store=${store} onClose=${() => setPanel("")} />`}
      ${panel === "keys" && html`<${Keys} onClose=${() => setPanel("")} />`}
      <div class="sr" role="status" aria-live="polite">${store.spoken}</div>
    </div>`;
}

const store = new Store();
mount(html`<${App} store=${store} />`);
store.start();
