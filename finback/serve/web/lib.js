// The few names that every component needs.
import { Component, h, render } from "./vendor/preact.js";
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";

/** Templates that become Preact nodes: html`<p>${text}</p>`. Texts are inserted as text, never as HTML. */
export const html = htm.bind(h);
export { Component, render, useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState };

/** Draw a page in place of the content shown while its scripts load. */
export function mount(view) {
  const app = document.getElementById("app");
  app.replaceChildren();
  render(view, app);
}

/** A component that is redrawn only when one of its properties is another object or value. */
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

/** A source of notifications. */
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

/** Redraw a component at every notification of the signal. */
export function useSignal(signal) {
  const [, again] = useState(0);
  useEffect(() => signal.listen(() => again((n) => n + 1)), [signal]);
}

/** The value stored in localStorage under finback.NAME; the fallback if storage is off or the value is not JSON. */
export function remembered(name, fallback) {
  try {
    const text = localStorage.getItem(`finback.${name}`);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

/** Store a value for the next visit. */
export function remember(name, value) {
  try {
    localStorage.setItem(`finback.${name}`, JSON.stringify(value));
  } catch {
    // storage is off or full: the page works without stored values
  }
}

/** Remove a stored value. */
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

/** Whether a key belongs to the composition of a character; in Safari the key that ends one comes after it, with code 229. */
export const composes = (event) => event.isComposing || event.keyCode === 229;

/** The address of a file of the page. */
export const asset = (name) => new URL(name, import.meta.url).pathname;
