// A chat is a tree of messages: editing or asking again adds a branch, nothing is lost.
import { fresh } from "../lib.js";

/**
 * @typedef {{id: string, parent: string, role: "user"|"assistant", content: string, reasoning?: string, at: number,
 *   state?: "waiting"|"thinking"|"answering"|"done"|"stopped"|"failed"|"cut", beat?: number, error?: string, model?: string,
 *   stream?: {id: string, at: number}, pair?: string, thoughtMs?: number, finish?: string, timings?: object, usage?: object, tokens?: object[]}} Node
 * @typedef {{id: string, title: string, namedAt?: number, created: number, updated: number, settings: object,
 *   nodes: Object<string, Node>, chosen: Object<string, string>}} Chat
 */

export const ROOT = "root";
export const RUNNING = ["waiting", "thinking", "answering"];
/** When the tab that writes an answer last changed it, in milliseconds. */
export const stamp = (node) => node.beat ?? 0;
export const isRunning = (node) => RUNNING.includes(node.state);

/** @returns {Chat} */
export function newChat(settings) {
  const now = Date.now();
  return { id: fresh(), title: "New chat", created: now, updated: now, settings, nodes: {}, chosen: {} };
}

/** Messages that directly follow one, the oldest first. */
export function children(chat, id) {
  const found = Object.values(chat.nodes).filter((node) => node.parent === id);
  return found.sort((a, b) => a.at - b.at || (a.id < b.id ? -1 : 1));
}

/** The messages that are shown, from the first one on: at each, the chosen branch follows, or else the latest. */
export function path(chat) {
  const byParent = new Map();
  for (const node of Object.values(chat.nodes)) {
    if (!byParent.has(node.parent)) byParent.set(node.parent, []);
    byParent.get(node.parent).push(node);
  }
  const found = [];
  for (let id = ROOT; byParent.has(id); ) {
    const branches = byParent.get(id).sort((a, b) => a.at - b.at || (a.id < b.id ? -1 : 1));
    const next = branches.find((node) => node.id === chat.chosen[id]) ?? branches.at(-1);
    found.push({ node: next, place: branches.indexOf(next) + 1, count: branches.length, branches });
    id = next.id;
  }
  return found;
}

/** A chat with a message added and chosen. */
export function added(chat, node) {
  const title = !chat.namedAt && node.role === "user" && node.parent === ROOT ? titleOf(node.content) : chat.title;
  const chosen = { ...chat.chosen, [node.parent]: node.id };
  return { ...chat, title, nodes: { ...chat.nodes, [node.id]: node }, chosen, updated: Date.now() };
}

/** A chat with another version of a message, followed by copies of the shown messages after the old version. */
export function rewritten(chat, old, node) {
  const shown = path(chat).map((step) => step.node);
  let next = added(chat, node);
  let parent = node.id;
  for (const later of shown.slice(shown.findIndex((n) => n.id === old.id) + 1)) {
    next = added(next, { ...later, id: fresh(), parent, pair: undefined });
    parent = next.chosen[parent];
  }
  return next;
}

/** A chat with a message changed. */
export const changed = (chat, id, change) => ({
  ...chat,
  nodes: { ...chat.nodes, [id]: { ...chat.nodes[id], ...change } },
  updated: Date.now(),
});

/** A chat that shows another branch. */
export const choose = (chat, node) => ({ ...chat, chosen: { ...chat.chosen, [node.parent]: node.id } });

/** The messages before one, the oldest first. */
export function ancestors(chat, node) {
  const found = [];
  for (let at = chat.nodes[node.parent]; at; at = chat.nodes[at.parent]) found.unshift(at);
  return found;
}

/** Merges the versions of a chat from two tabs: every message of both, the newer one's choices. */
export function merged(mine, theirs) {
  const nodes = { ...theirs.nodes };
  for (const [id, node] of Object.entries(mine.nodes)) {
    // the tab that writes an answer stamps it at every change, so another tab's copy has an older stamp
    if (!nodes[id] || stamp(node) >= stamp(nodes[id])) nodes[id] = node;
  }
  const newer = mine.updated >= theirs.updated ? mine : theirs;
  const [a, b] = [mine.namedAt ?? 0, theirs.namedAt ?? 0];
  const { title, namedAt } = a === b ? newer : a > b ? mine : theirs;
  return { ...newer, title, namedAt, nodes, chosen: { ...theirs.chosen, ...mine.chosen, ...newer.chosen } };
}

/** A chat with only its last messages, for storage without room for all. */
export function ended(chat) {
  const last = (node) => Math.max(node.at, stamp(node));
  const nodes = Object.values(chat.nodes).sort((a, b) => last(a) - last(b)).slice(-4);
  return { ...chat, nodes: Object.fromEntries(nodes.map((node) => [node.id, node])) };
}

function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "New chat";
}
