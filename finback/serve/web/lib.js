// The few names that every component needs.
import { Component, h, render } from "./vendor/preact.js";
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";

/** Templates that become Preact nodes: html`<p>${text}</p>`. Texts are texts, never HTML. */
export const html = htm.bind(h);
export { Component, render, useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState };

/** Draw a page in the place of what stood there until its scripts had come. */
export function mount(view) {
  const app = document.getElementById("app");
  app.replaceChildren();
  render(view, app);
}

/** A component that is drawn again only when one of its properties is another object or value. */
export function pure(draw) {
  return class extends Component {
    shouldComponentUpdate(next) {
      const names = new Set([...Object.keys(next), ...Object.keys(this.props)]);
      return [...names].some((name) => next[name] !== this.props[name]);
    }

    render() {
      return h(draw, this.props);
    }
  };
}

/** Something that can be listened to. */
export class Signal {
  #listeners = new Set();

  listen(heard) {
    this.#listeners.add(heard);
    return () => this.#listeners.delete(heard);
  }

  notify(what) {
    for (const heard of [...this.#listeners]) heard(what);
  }
}

/** Draw a component again at every notification of the signal. */
export function useSignal(signal) {
  const [, again] = useState(0);
  useEffect(() => signal.listen(() => again((n) => n + 1)), [signal]);
}

/** A value kept in localStorage under finback.NAME; the fallback where storage is off or holds nonsense. */
export function remembered(name, fallback) {
  try {
    const text = localStorage.getItem(`finback.${name}`);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

/** Keep a value for the next visit. */
export function remember(name, value) {
  try {
    localStorage.setItem(`finback.${name}`, JSON.stringify(value));
  } catch {
    // storage is off or full: the page works without a memory
  }
}

/** Keep a value no longer. */
export function forget(name) {
  try {
    localStorage.removeItem(`finback.${name}`);
  } catch {
    // storage is off: there is nothing to forget
  }
}

/** An identifier that no other message has. */
export function fresh() {
  const bytes = crypto.getRandomValues(new Uint8Array(9)); // randomUUID is missing on plain http
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

/** Whether a key belongs to the writing of a character; Safari ends that before the key that ended it, which has the code 229. */
export const composes = (event) => event.isComposing || event.keyCode === 229;

/** The address of a file of the page. */
export const asset = (name) => new URL(name, import.meta.url).pathname;
