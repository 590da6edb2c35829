// Unsent messages: one for each chat, and one for the next new chat. They survive a reload.
import { forget, remember, remembered } from "../lib.js";

const DRAFTS = new Map(); // for browsers without storage, and so that two tabs do not change each other's field

/** The name of a chat's draft: its id, or "new" before its first message. */
export const draftName = (chat) => (Object.keys(chat.nodes).length ? chat.id : "new");

export const draftOf = (name) => DRAFTS.get(name) ?? remembered(`draft.${name}`, "");

/** Store a draft; an empty one is removed. */
export function keepDraft(name, text) {
  DRAFTS.set(name, text);
  if (text) remember(`draft.${name}`, text);
  else forget(`draft.${name}`);
}
