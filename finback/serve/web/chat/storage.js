// Chats in this browser: IndexedDB, one record a chat, and a word to the other tabs when one has changed.
import { Signal } from "../lib.js";
import { ended, merged } from "./tree.js";

const STORE = "chats";
const PATIENCE = 3000; // milliseconds after which a database that does not open is none
const LEFT = "finback.left"; // what a tab that was closed had not on the disk yet: IndexedDB has no time for it then

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
 * Where chats are stored. Without IndexedDB they last as long as the tab. What has been removed leaves a mark, { id, isRemoved }:
 * another tab that still writes to it must not bring it back.
 */
export class Storage {
  #database = null;
  #memory = new Map();
  #pending = new Map(); // by id: a chat on its way to the disk, or null where it is being removed
  #channel = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel("finback");
  /** Notifies of the id of a chat that another tab has changed. */
  changed = new Signal();

  async open() {
    this.#database = await opened().catch(() => null);
    await this.all().catch(() => (this.#database = null)); // one that opens and cannot be read is none
    if (this.#channel) this.#channel.onmessage = (event) => this.changed.notify(event.data);
    await this.#takeLeft();
  }

  get isLasting() {
    return this.#database !== null;
  }

  /** Every chat, the one that changed last first. */
  async all() {
    const found = this.#database ? await promised(this.#store("readonly").getAll()) : [...this.#memory.values()];
    return found.filter((chat) => !chat.isRemoved).sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    const found = this.#database ? await promised(this.#store("readonly").get(id)) : this.#memory.get(id);
    return found?.isRemoved ? undefined : found;
  }

  /** Keep a chat, with what another tab may have added to it. `whole`: as it is, without a look at what was there. */
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

  /** In the last moment of a tab: keep what the disk may not have yet, and `chats`, whose answers are being written. */
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
        // no room for long chats: their last messages then, or what was saved a second ago
      }
    }
  }

  /** Take in what tabs have left behind. */
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
