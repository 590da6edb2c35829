// The palette for canvases: CSS variables as the colours they are right now.
const probe = document.createElement("span");
probe.hidden = true;
document.documentElement.append(probe);

/** What a variable of palette.css stands for, light or dark. */
export function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

export const SERIES = 8;
export const series = (i) => `series-${(i % SERIES) + 1}`;

/** A colour with some of it taken away. */
export const faint = (css, share) => css.replace(/^rgb\(([^)]+)\)$/, (_, parts) => `rgba(${parts}, ${share})`);
