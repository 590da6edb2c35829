// Checks a chat from a file: every value that the page draws, and that its messages form a tree.
import { SETTINGS } from "./request.js";
import { ROOT, RUNNING } from "./tree.js";

const isText = (value) => typeof value === "string";
const isNumber = Number.isFinite;
const isTruth = (value) => typeof value === "boolean";
const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const among = (words) => (value) => words.includes(value);
const each = (check) => (value) => isRecord(value) && Object.values(value).every(check);
const list = (check) => (value) => Array.isArray(value) && value.every(check);
const isOdds = (value) => Array.isArray(value) && isText(value[0]) && isNumber(value[1]);
const isToken = (value) => isOdds(value) && list(isOdds)(value[2]) && (value[3] === undefined || isTruth(value[3]));

const NEEDED = { id: isText, parent: isText, role: among(["user", "assistant"]), content: isText };
const POSSIBLE = {
  reasoning: isText,
  at: isNumber,
  state: among([...RUNNING, "done", "stopped", "failed", "cut"]),
  beat: isNumber,
  error: isText,
  errorState: isText,
  model: isText,
  stream: ({ id, at }) => isText(id) && isNumber(at),
  pair: isText,
  side: isNumber,
  thoughtMs: isNumber,
  finish: isText,
  timings: (value) => each(isNumber)(value) && ["predicted_n", "queue_ms", "prompt_ms", "prompt_n", "cache_n"].every((k) => k in value),
  usage: (value) => isRecord(value) && isNumber(value.total_tokens),
  tokens: list(isToken),
  isEdited: isTruth,
};
const KNOBS = Object.fromEntries(Object.entries(SETTINGS).map(([name, value]) => [name, isTruth(value) ? isTruth : isText]));
KNOBS.sampling = each((value) => isText(value) || isNumber(value));

/** Whether each check holds for its field of `value`, if `value` has that field. */
const holds = (checks, value) =>
  Object.entries(checks).every(([name, check]) => value[name] === undefined || value[name] === null || check(value[name]));

/** Whether something read from a file is a chat that can be shown. */
export function isChat(chat) {
  if (!isRecord(chat) || ![chat.id, chat.title].every(isText) || ![chat.created, chat.updated].every(isNumber)) return false;
  if (!isRecord(chat.settings) || !isText(chat.settings.system) || !holds(KNOBS, chat.settings)) return false;
  if (!isRecord(chat.nodes) || !each(isText)(chat.chosen)) return false;
  return Object.entries(chat.nodes).every(([id, node]) => isNode(node) && node.id === id) && isTree(chat.nodes);
}

const isNode = (node) =>
  isRecord(node) && Object.entries(NEEDED).every(([name, check]) => check(node[name])) && holds(POSSIBLE, node);

/** Whether every message is reached from the root: no circle, none whose parent is missing, none with the root's id. */
function isTree(nodes) {
  const behind = new Map();
  for (const { id, parent } of Object.values(nodes)) {
    if (!behind.has(parent)) behind.set(parent, []);
    behind.get(parent).push(id);
  }
  if (Object.hasOwn(nodes, ROOT)) return false;
  let reached = 0;
  for (let found = behind.get(ROOT) ?? []; found.length; found = found.flatMap((id) => behind.get(id) ?? [])) reached += found.length;
  return reached === Object.keys(nodes).length;
}
