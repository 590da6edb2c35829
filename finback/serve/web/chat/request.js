// Turns a chat and its settings into a request.
import { ancestors } from "./tree.js";

export const PRESETS = {
  model: { label: "Model’s own", values: {} },
  precise: { label: "Precise", values: { temperature: 0 } },
  balanced: { label: "Balanced", values: { temperature: 0.6, top_p: 0.95 } },
  creative: { label: "Creative", values: { temperature: 1, top_p: 0.98, min_p: 0.02 } },
  custom: { label: "Custom", values: null },
};

export const SETTINGS = {
  model: "",
  beside: "",
  system: "",
  preset: "model",
  sampling: {},
  seed: "",
  maxTokens: "",
  thinking: "auto",
  budget: "",
  logprobs: false,
};

const number = (text) =>
  text === "" || text === undefined || text === null || Number.isNaN(Number(text)) ? undefined : Number(text);

/** The sampling parameters of a preset. */
export const samplingOf = (settings) => PRESETS[settings.preset]?.values ?? settings.sampling;

/** The body of a request for the answer `node`, which continues the text that it already has. */
export function bodyOf(chat, node) {
  const { settings } = chat;
  const said = ancestors(chat, node).filter(({ role, content }) => role === "user" || content.trim()); // without answers that failed at once
  const earlier = said.map(({ role, content }) => ({ role, content }));
  const messages = settings.system.trim() ? [{ role: "system", content: settings.system }, ...earlier] : earlier;
  if (node.content || node.reasoning) {
    messages.push({
      role: "assistant",
      content: node.content,
      reasoning_content: node.reasoning || undefined,
      prefix: true,
    });
  }
  const wanted = { auto: undefined, on: { type: "enabled" }, off: { type: "disabled" } }[settings.thinking];
  const given = Object.entries(samplingOf(settings)).map(([name, value]) => [name, number(value)]);
  return {
    model: node.model || undefined,
    messages,
    stream: true,
    stream_options: { include_usage: true, resumable: true },
    thinking: wanted,
    thinking_budget: settings.thinking === "off" ? undefined : number(settings.budget),
    seed: number(settings.seed),
    max_tokens: number(settings.maxTokens),
    logprobs: settings.logprobs || undefined,
    top_logprobs: settings.logprobs ? 5 : undefined,
    ...Object.fromEntries(given.filter(([, value]) => value !== undefined)),
  };
}

/** A refusal as a state and a message of this page. */
export function explained(error) {
  if (error.code === "context_length_exceeded") {
    return {
      state: "full",
      text: "This conversation no longer fits the model’s window. Shorten a message by editing it, ask for fewer tokens, or start a new chat.",
    };
  }
  if (error.status === 401) return { state: "key", text: "The server wants another key." };
  if (error.status === 0) return { state: "gone", text: error.message };
  if (error.status === 503)
    return { state: "busy", text: `The server cannot take this now: ${error.message}. Try again in a moment.` };
  if (error.status === 429) return { state: "busy", text: `Too many requests: ${error.message}.` };
  return { state: "refused", text: error.message };
}
