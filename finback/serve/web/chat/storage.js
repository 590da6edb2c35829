// Stores chats in this browser: IndexedDB with one record per chat, and a message to other tabs when one has changed.
import { Signal } from "../lib.js";
import { ended, merged } from "./tree.js";

const STORE = "chats";
const PATIENCE = 3000; // milliseconds to wait for the database to open
const LEFT = "finback.left"; // unsaved chats of closed tabs: IndexedDB has no time to save them while a tab closes

const promised = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

async function opened() {
  const request = indexedDB.open("finback", 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  const late = new Promise((_, reject) => setTimeout(() => reject(new Error("no answer")), PATIENCE));
  return Promise.race([promised(request), late]);
}

/**
 * The stored chats. Without IndexedDB they last as long as the tab. A removed chat leaves a mark, { id, isRemoved }, so that
 * another tab that still writes to it does not restore it.
 */
export class Storage {
  #database = null;
  #memory = new Map();
  #pending = new Map(); // by id: a chat that is being saved, or null for one that is being removed
  #channel = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel("finback");
  /** Notifies of the id of a chat that another tab has changed. */
  changed = new Signal();

  async open() {
    this.#database = await opened().catch(() => null);
    await this.all().catch(() => (this.#database = null)); // a database that opens but cannot be read is not used
    if (this.#channel) this.#channel.onmessage = (event) => this.changed.notify(event.data);
    await this.#takeLeft();
  }

  get isLasting() {
    return this.#database !== null;
  }

  /** Every chat, latest change first. */
  async all() {
    const found = this.#database ? await promised(this.#store("readonly").getAll()) : [...this.#memory.values()];
    return found.filter((chat) => !chat.isRemoved).sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    const found = this.#database ? await promised(this.#store("readonly").get(id)) : this.#memory.get(id);
    return found?.isRemoved ? undefined : found;
  }

  /** Store a chat, merged with the version that another tab may have stored. `whole`: replace the stored version. */
  put(chat, { whole = false } = {}) {
    return this.#write(chat.id, chat, async () => {
      if (!this.#database) return void this.#memory.set(chat.id, chat);
      const store = this.#store("readwrite");
      const before = whole ? undefined : await promised(store.get(chat.id));
      if (!before?.isRemoved) await promised(store.put(before ? merged(chat, before) : chat));
    });
  }

  remove(id) {
    return this.#write(id, null, async () => {
      if (this.#database) await promised(this.#store("readwrite").put({ id, isRemoved: true }));
      else this.#memory.delete(id);
    });
  }

  /** When the tab closes: store what may not be saved yet, and `chats`, whose answers are being written. */
  leave(chats) {
    if (!this.#database) return;
    const pending = new Map([...this.#pending, ...chats.map((chat) => [chat.id, chat])]);
    if (!pending.size) return;
    const left = [...pending].map(([id, chat]) => ({ id, chat }));
    const ends = left.map(({ id, chat }) => ({ id, chat: chat && ended(chat), isEnd: Boolean(chat) }));
    for (const entries of [left, ends]) {
      try {
        const before = JSON.parse(localStorage.getItem(LEFT) ?? "[]");
        return localStorage.setItem(LEFT, JSON.stringify([...before, ...entries]));
      } catch {
        // no room for long chats: store only their last messages, or rely on the save of a second ago
      }
    }
  }

  /** Save what closed tabs have left behind. */
  async #takeLeft() {
    let left = [];
    try {
      left = JSON.parse(localStorage.getItem(LEFT) ?? "[]");
      localStorage.removeItem(LEFT);
    } catch {
      return;
    }
    for (const { id, chat, isEnd } of left) {
      if (!chat) await this.remove(id);
      else if (!isEnd || (await this.get(id))) await this.put(chat);
    }
  }

  async #write(id, chat, work) {
    this.#pending.set(id, chat);
    await work();
    if (this.#pending.get(id) === chat) this.#pending.delete(id);
    this.#channel?.postMessage(id);
  }

  #store(mode) {
    return this.#database.transaction(STORE, mode).objectStore(STORE);
  }
}
