// State and actions of the chat page. Components draw `store` and call its actions.
import { askJson } from "../api.js";
import { Signal, fresh, remember, remembered } from "../lib.js";
import { Answer } from "./answer.js";
import { keepDraft } from "./drafts.js";
import { SETTINGS } from "./request.js";
import { Storage } from "./storage.js";
import { ROOT, added, changed, choose, isRunning, newChat, path, rewritten } from "./tree.js";

const SAVE = 1000; // milliseconds between saves of an answer that is being written
const STALE = 4000; // milliseconds without a beat after which the tab that wrote an answer counts as gone

export class Store extends Signal {
  storage = new Storage();
  chats = [];
  chat = newChat({ ...SETTINGS, ...remembered("settings", {}) });
  models = [];
  server = "loading"; // loading, ready, gone, locked
  spoken = ""; // for screen readers
  answers = new Map(); // by node id
  #saving = 0;

  async start() {
    await this.storage.open();
    this.chats = await this.storage.all();
    this.storage.changed.listen((id) => this.#heard(id));
    addEventListener("pagehide", () => this.#leave());
    const wanted = location.hash.slice(1);
    const found = this.chats.find((chat) => chat.id === wanted);
    if (found) this.chat = this.#settled(found);
    this.notify();
    await this.connect();
  }

  /** Ask for the models; notifies of the state of the server. */
  async connect() {
    try {
      this.models = (await askJson("/v1/models")).data;
      this.server = "ready";
      this.#rejoin();
    } catch (error) {
      this.server = error.status === 401 ? "locked" : "gone";
    }
    this.notify();
  }

  get busy() {
    return [...this.answers.values()].some((answer) => answer.chat.id === this.chat.id);
  }

  /** Whether chats are lost when this tab closes. */
  get forgets() {
    return !this.storage.isLasting && this.server !== "loading";
  }

  get model() {
    return this.models.find((m) => m.id === this.chat.settings.model) ?? this.models[0];
  }

  /** The context length of the chat's model, in tokens. */
  get window() {
    return this.model?.max_model_len ?? 0;
  }

  /** Whether the chat's model can be asked to think. */
  get thinks() {
    return this.model?.thinking !== false;
  }

  open(id) {
    const found = this.chats.find((chat) => chat.id === id);
    if (found) this.#show(this.#settled(found));
  }

  /** A new chat, with the settings of this one. */
  begin() {
    this.#show(newChat({ ...this.chat.settings }));
  }

  configure(change) {
    const settings = { ...this.chat.settings, ...change };
    this.chat = { ...this.chat, settings };
    const { system, ...lasting } = settings;
    remember("settings", lasting);
    if (Object.keys(this.chat.nodes).length) this.#save(this.chat);
    this.notify();
  }

  /** Send a message after the last one, or in place of another (`instead`), and request an answer. */
  say(content, instead) {
    const parent = instead ? instead.parent : (path(this.chat).at(-1)?.node.id ?? ROOT);
    const node = { id: fresh(), parent, role: "user", content, at: Date.now() };
    this.chat = added(this.chat, node);
    this.#ask(node.id);
  }

  /** Change a message without a new answer: adds a branch with copies of the messages that followed. */
  rewrite(old, content) {
    this.#keep(
      rewritten(this.chat, old, {
        ...old,
        id: fresh(),
        content,
        at: Date.now(),
        state: old.role === "assistant" ? "done" : undefined,
        isEdited: true,
        tokens: undefined,
        timings: undefined,
        pair: undefined,
      }),
    );
  }

  /** Request another answer to the same message. */
  again(node) {
    this.#ask(node.parent);
  }

  /** Continue an answer where it stopped. */
  resume(node) {
    if (!node.content && !node.reasoning) return this.again(node);
    return this.#run(node);
  }

  choose(node) {
    this.#keep(choose(this.chat, node));
  }

  stop() {
    this.#stopAll(this.chat.id);
  }

  rename(id, title) {
    const chat = this.chats.find((c) => c.id === id);
    if (chat && title.trim()) this.#replace({ ...chat, title: title.trim(), namedAt: Date.now() });
  }

  async remove(id) {
    this.#stopAll(id);
    this.chats = this.chats.filter((chat) => chat.id !== id);
    if (this.chat.id === id) this.begin();
    keepDraft(id, "");
    await this.storage.remove(id);
    this.notify();
  }

  #stopAll(id) {
    for (const answer of this.answers.values()) if (answer.chat.id === id) answer.stop();
  }

  async removeAll() {
    await Promise.all(this.chats.map(({ id }) => this.remove(id)));
  }

  /** Import chats; they replace stored ones with the same id. */
  async bring(chats) {
    for (const chat of chats) await this.storage.put(chat, { whole: true });
    this.chats = await this.storage.all();
    if (chats.length) this.open(chats[0].id);
    this.notify();
  }

  #ask(parent) {
    const { model, beside } = this.chat.settings;
    const first = model || this.models[0]?.id || "";
    const pair = beside ? fresh() : undefined;
    const nodes = (beside ? [first, beside] : [first]).map((name, i) => ({
      id: fresh(),
      parent,
      role: "assistant",
      content: "",
      at: Date.now() + i,
      model: name,
      pair,
      side: i,
    }));
    for (const node of nodes) this.chat = added(this.chat, node);
    if (pair) this.chat = choose(this.chat, nodes[0]);
    history.replaceState(null, "", `#${this.chat.id}`);
    for (const node of nodes) this.#run(node);
  }

  /** `joins`: the server already generates it. */
  #run(node, chat = this.chat, joins = false) {
    const answer = new Answer(chat, node, (ended) => this.#ended(ended), joins);
    this.answers.set(node.id, answer);
    this.#keep(changed(chat, node.id, { ...answer.node, beat: Date.now() }));
    answer.run();
    this.#saving ||= setInterval(() => this.#beat(), SAVE);
  }

  /** Resume the answers that were being written when the page was closed or the network was lost. */
  #rejoin() {
    for (const { id } of [this.chat, ...this.chats])
      for (const node of Object.values(this.#latest(id)?.nodes ?? {}))
        if (node.stream && (node.state === "cut" || node.errorState === "gone") && !this.answers.has(node.id))
          this.#run(node, this.#latest(id), true);
  }

  #ended(answer) {
    const { node, chat } = answer;
    this.answers.delete(node.id);
    const now = this.#latest(chat.id);
    if (now) this.#keep(changed(now, node.id, { ...node, beat: Date.now() }));
    const words = { done: "Answer finished.", stopped: "Stopped.", failed: `The answer failed. ${node.error}` };
    this.spoken = words[node.state] ?? "";
    if (node.errorState === "gone") this.server = "gone";
    if (node.errorState === "key") this.server = "locked";
    if (!this.answers.size) {
      clearInterval(this.#saving);
      this.#saving = 0;
    }
    this.notify();
  }

  #beat() {
    for (const { timed, chat } of this.answers.values()) {
      const now = this.#latest(chat.id);
      if (now) this.#keep(changed(now, timed.id, { ...timed, beat: Date.now() }));
    }
  }

  #leave() {
    const left = new Map();
    for (const { timed, chat } of this.answers.values()) {
      const now = left.get(chat.id) ?? this.#latest(chat.id);
      if (now) left.set(chat.id, changed(now, timed.id, { ...timed, state: "cut", beat: Date.now() }));
    }
    this.storage.leave([...left.values()]);
  }

  #latest(id) {
    return this.chat.id === id ? this.chat : this.chats.find((chat) => chat.id === id);
  }

  #show(chat) {
    this.chat = chat;
    this.spoken = "";
    history.replaceState(null, "", Object.keys(chat.nodes).length ? `#${chat.id}` : location.pathname);
    this.notify();
  }

  #keep(chat) {
    if (this.chat.id === chat.id) this.chat = chat;
    this.#replace(chat);
  }

  #replace(chat) {
    if (this.chat.id === chat.id) this.chat = { ...this.chat, ...chat };
    this.chats = [chat, ...this.chats.filter((c) => c.id !== chat.id)].sort((a, b) => b.updated - a.updated);
    this.#save(chat);
    this.notify();
  }

  #save(chat) {
    this.storage.put(chat).catch(() => {
      this.storageFailed = true;
      this.notify();
    });
  }

  async #heard(id) {
    const found = await this.storage.get(id);
    this.chats = await this.storage.all();
    if (!found) this.#stopAll(id); // another tab has deleted it
    // an answer that this tab is writing is newer here
    if (this.chat.id === id && (!found || !this.busy))
      this.chat = found ? this.#settled(found) : newChat({ ...this.chat.settings });
    if (this.server === "ready") this.#rejoin();
    this.notify();
  }

  /** A chat in which only answers that a tab still writes count as running; others are marked as cut. */
  #settled(chat) {
    const nodes = { ...chat.nodes };
    for (const node of Object.values(nodes)) {
      if (!isRunning(node) || this.answers.has(node.id)) continue;
      const left = STALE - (Date.now() - (node.beat ?? 0));
      if (left <= 0) nodes[node.id] = { ...node, state: "cut" };
      else setTimeout(() => this.#heard(chat.id), left + 100);
    }
    return { ...chat, settings: { ...SETTINGS, ...chat.settings }, nodes };
  }
}
