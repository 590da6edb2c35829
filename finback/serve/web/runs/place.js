// Addresses inside the page of the runs.

/** The link to a run, a view, a step. */
export const linkTo = (place) =>
  `#${new URLSearchParams(Object.entries(place).filter(([, v]) => v !== undefined && v !== "" && v !== null))}`;

/** Go to a place; `replace` leaves no step to go back to. */
export function go(place, replace = false) {
  if (replace) {
    history.replaceState(null, "", linkTo(place));
    dispatchEvent(new Event("hashchange"));
  } else location.hash = linkTo(place);
}
