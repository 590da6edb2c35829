// Requests to the server: the key, error messages, streams as objects.
import { Signal } from "./lib.js";

const KEY = "finback.key";
/** Notifies when the server wants another key. */
export const locked = new Signal();

/** The key, for as long as this tab is open. */
export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function setKey(value) {
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // storage is off: the key lasts until the next load
  }
}

/** A refused request. `code` is the API's error code; status 0: the server did not answer. */
export class Refused extends Error {
  constructor(status, message, code = "", retryAfter = 0) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** One request; Refused for anything but success. */
export async function ask(path, { body, signal } = {}) {
  const headers = key() ? { authorization: `Bearer ${key()}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    const content = body === undefined ? undefined : JSON.stringify(body);
    response = await fetch(path, { method: content ? "POST" : "GET", headers, body: content, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.", "gone");
  }
  if (response.ok) return response;
  const reply = await response.json().catch(() => ({}));
  if (response.status === 401) locked.notify();
  const { message = `The server replied with status ${response.status}.`, code = "" } = reply.error ?? {};
  throw new Refused(response.status, message, code, Number(response.headers.get("retry-after")) || 0);
}

export const askJson = async (path, options) => (await ask(path, options)).json();

/** Query text of a path. */
export function query(path, parts) {
  const given = Object.entries(parts).filter(([, v]) => v !== undefined && v !== null && v !== "");
  return `${path}?${new URLSearchParams(given.map(([k, v]) => [k, String(v)]))}`;
}

/**
 * The events of a stream as objects, until it ends; Refused if the server reports a failure. In a resumable stream, each has
 * its number as `at`; while the request waits, its position in the queue arrives as { queue }.
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let at = 0;
  let isWhole = false; // a stream that ends without [DONE] broke
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      const chunks = [];
      for (const line of lines) {
        if (line.startsWith("id: ")) at = Number(line.slice(4));
        else if (line === "data: [DONE]") isWhole = true;
        else if (line.startsWith("data: ")) chunks.push({ ...chunkOf(line.slice(6)), at });
        else if (line.startsWith(": queue ")) chunks.push({ queue: Number(line.slice(8)), choices: [] });
      }
      if (chunks.length) yield chunks;
    }
  } catch (error) {
    if (error instanceof Refused || error.name === "AbortError") throw error;
    throw broken();
  } finally {
    if (!isWhole) reader.cancel().catch(() => {});
  }
  if (!isWhole) throw broken();
}

const broken = () => new Refused(0, "The connection broke.", "gone");

function chunkOf(text) {
  const chunk = JSON.parse(text);
  if (!chunk.error) return chunk;
  throw new Refused(chunk.error.code === "shutting_down" ? 503 : 500, chunk.error.message, chunk.error.code);
}
