// The component around the view.
import { html, useEffect, useLayoutEffect, useRef } from "../lib.js";
import { MarkdownView } from "./view.js";

/** A text as markdown; `done` when no more will come. */
export function Markdown({ text, done }) {
  const root = useRef();
  const view = useRef();
  useLayoutEffect(() => {
    view.current ??= new MarkdownView(root.current);
    view.current.show(text, done);
  }, [text, done]);
  useEffect(() => () => view.current?.close(), []);
  return html`<div class="prose" ref=${root}></div>`;
}
