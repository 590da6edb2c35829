// One answer being written: it reads the stream, measures the time, and can be stopped.
import { ask, events } from "../api.js";
import { Signal } from "../lib.js";
import { bodyOf, explained } from "./request.js";

const AGAIN = [200, 800, 2000]; // milliseconds before each attempt to resume after the connection broke

/** Waits; `signal` ends the wait early. */
const pause = (ms, signal) =>
  new Promise((done) => {
    setTimeout(done, ms);
    signal.addEventListener("abort", done, { once: true });
  });

/** The answer `node` of `chat`. `updated` notifies at most once a frame; `ended` is called once. */
export class Answer {
  #abort = new AbortController();
  #frame = 0;
  #thoughtAt = 0;
  updated = new Signal();
  queue = 0; // its position in the queue

  /** `joins`: the server already generates it, under the id `node.stream.id`. */
  constructor(chat, node, ended, joins = false) {
    const state = !joins ? "waiting" : node.content ? "answering" : node.reasoning ? "thinking" : "waiting";
    this.chat = chat;
    this.node = { ...node, state, error: undefined, errorState: undefined, finish: undefined };
    if (!joins) this.node.stream = undefined;
    if (state === "thinking") this.#thoughtAt = performance.now();
    this.ended = ended;
    this.joins = joins;
  }

  /** The server's id for it, known from the first chunk on. */
  get id() {
    return this.node.stream?.id ?? "";
  }

  /** The node with its thinking time so far. */
  get timed() {
    if (!this.#thoughtAt) return this.node;
    return { ...this.node, thoughtMs: (this.node.thoughtMs ?? 0) + performance.now() - this.#thoughtAt };
  }

  /** Ask and read to the end; never throws. */
  async run() {
    let change = {};
    try {
      await this.#readAll();
      change = { state: "done" };
    } catch (error) {
      if (error.name === "AbortError" || error.code === "stopped") change = { state: "stopped" };
      else if (this.joins && error.status === 404) change = { state: "cut" };
      else {
        const { state, text } = explained(error);
        change = { state: "failed", error: text, errorState: state };
      }
    }
    cancelAnimationFrame(this.#frame);
    if (!this.node.content) this.#closeThought();
    const { stream } = this.node; // if the network is gone, the server may still be generating
    this.node = { ...this.node, ...change, stream: change.errorState === "gone" ? stream : undefined };
    this.ended(this);
  }

  /** Keep the text so far, and ask the server to stop. */
  stop() {
    this.#abort.abort();
    if (this.id) ask(`/v1/chat/completions/${this.id}/control`, { body: { action: "stop" } }).catch(() => {});
  }

  async #readAll() {
    for (let tries = 0; ; ) {
      try {
        const response = await this.#opened();
        for await (const chunks of events(response)) {
          for (const chunk of chunks) this.#take(chunk);
          this.#notify();
          tries = 0;
        }
        return;
      } catch (error) {
        if (error.code !== "gone" || !this.id || tries === AGAIN.length) throw error;
        await pause(AGAIN[tries++], this.#abort.signal);
        this.#abort.signal.throwIfAborted();
      }
    }
  }

  /** The stream from its beginning, or after the last event received. */
  #opened() {
    const { signal } = this.#abort;
    const { id, at } = this.node.stream ?? {};
    if (id) return ask(`/v1/chat/completions/${id}/stream?after=${at}`, { signal });
    return ask("/v1/chat/completions", { body: bodyOf(this.chat, this.node), signal });
  }

  /** Ask the server to close the chain of thought and answer. */
  answerNow() {
    return this.id
      ? ask(`/v1/chat/completions/${this.id}/control`, { body: { action: "answer_now" } }).catch(() => {})
      : undefined;
  }

  #take(chunk) {
    if (chunk.queue !== undefined) return void (this.queue = chunk.queue);
    const node = this.node;
    if (chunk.at) node.stream = { id: chunk.id, at: chunk.at };
    if (chunk.usage) node.usage = chunk.usage;
    if (chunk.timings) node.timings = chunk.timings;
    const [choice] = chunk.choices;
    if (!choice) return;
    const { reasoning_content: reasoning, content } = choice.delta;
    if (reasoning) {
      this.#thoughtAt ||= performance.now();
      node.reasoning = (node.reasoning ?? "") + reasoning;
      node.state = "thinking";
    }
    if (content) {
      this.#closeThought();
      node.content += content;
      node.state = "answering";
    }
    if (choice.logprobs) this.#keepTokens(choice.logprobs);
    if (choice.finish_reason) node.finish = choice.finish_reason;
  }

  #closeThought() {
    if (this.#thoughtAt) this.node.thoughtMs = (this.node.thoughtMs ?? 0) + performance.now() - this.#thoughtAt;
    this.#thoughtAt = 0;
  }

  #keepTokens({ content }) {
    const short = (entry) => [entry.token, entry.logprob, entry.top_logprobs.map((t) => [t.token, t.logprob]), Boolean(entry.drafted)];
    this.node.tokens = [...(this.node.tokens ?? []), ...(content ?? []).map(short)];
  }

  /** At most once a frame, and never while the page is hidden: frames pause then. */
  #notify() {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.updated.notify();
    });
  }
}
