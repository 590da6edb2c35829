// What was begun and not sent: by chat, or for the next new one. It outlasts a reload.
import { forget, remember, remembered } from "../lib.js";

const DRAFTS = new Map(); // where the browser keeps nothing, and so that two tabs do not write into each other's field

/** Whose draft a chat has: the one that has not begun has the draft of the next. */
export const draftName = (chat) => (Object.keys(chat.nodes).length ? chat.id : "new");

export const draftOf = (name) => DRAFTS.get(name) ?? remembered(`draft.${name}`, "");

/** Keep a draft; none where it is empty. */
export function keepDraft(name, text) {
  DRAFTS.set(name, text);
  if (text) remember(`draft.${name}`, text);
  else forget(`draft.${name}`);
}
