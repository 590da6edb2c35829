// The palette for canvases: the current colours of CSS variables.
const probe = document.createElement("span");
probe.hidden = true;
document.documentElement.append(probe);

/** The current colour of a variable of palette.css, light or dark. */
export function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

export const SERIES = 8;
export const series = (i) => `series-${(i % SERIES) + 1}`;

/** A colour with reduced opacity. */
export const faint = (css, share) => css.replace(/^rgb\(([^)]+)\)$/, (_, parts) => `rgba(${parts}, ${share})`);
