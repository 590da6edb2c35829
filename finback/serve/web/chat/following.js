// A box that stays at its end while it grows, unless the user has scrolled up.
import { useLayoutEffect, useRef, useState } from "../lib.js";

const NEAR = 60; // pixels from the end that still count as the end when the user scrolls back

/** Refs for the scrolling box and its growing content, and whether the user has scrolled up. */
export function useFollowing(isShown = true) {
  const box = useRef();
  const inner = useRef();
  const follows = useRef(true);
  const last = useRef(0); // where the box was scrolled to
  const [away, setAway] = useState(false);
  const toEnd = () => {
    follows.current = true;
    if (box.current) box.current.scrollTop = box.current.scrollHeight;
  };
  const scrolled = () => {
    if (!box.current) return; // a late scroll event, and the box is gone
    const { scrollTop, scrollHeight, clientHeight } = box.current;
    const left = scrollHeight - scrollTop - clientHeight;
    const isUp = scrollTop < last.current - 1 && left > 1;
    last.current = scrollTop;
    follows.current = left < NEAR && !isUp;
    setAway(!follows.current);
  };
  useLayoutEffect(() => {
    if (!isShown) return;
    const seen = new ResizeObserver(() => follows.current && toEnd());
    seen.observe(inner.current);
    return () => seen.disconnect();
  }, [isShown]);
  return { box, inner, away, scrolled, toEnd };
}
