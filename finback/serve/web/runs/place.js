// Addresses inside the page of the runs.

/** The link to a run, a view, a step. */
export const linkTo = (place) =>
  `#${new URLSearchParams(Object.entries(place).filter(([, v]) => v !== undefined && v !== "" && v !== null))}`;

/** Go to a place; `replace` adds no entry to the browser's history. */
export function go(place, replace = false) {
  if (replace) {
    history.replaceState(null, "", linkTo(place));
    dispatchEvent(new Event("hashchange"));
  } else location.hash = linkTo(place);
}

/** A stage of a run as one word of an address; names may contain any character. */
export const stageId = (run, stage) => [run, stage].map(encodeURIComponent).join("|");

/** The names [run, stage] of such a word. */
export const stageOf = (id) => id.split("|").map(decoded);

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // written by hand
  }
}
