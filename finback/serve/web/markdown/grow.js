// Updates drawn nodes in place, so that selection, sideways scrolling and focus stay.

const TEXT = 3;
const ELEMENT = 1;

/** Make `old` show what `fresh` shows. Nodes are compared by position; equal ones are kept. */
export function grow(old, fresh) {
  const wanted = [...fresh.childNodes];
  wanted.forEach((node, i) => {
    const there = old.childNodes[i];
    if (!there) old.append(node);
    else if (!became(there, node)) there.replaceWith(node);
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

/** Make a node equal to another; returns false if that is impossible. */
function became(old, fresh) {
  if (old.nodeType !== fresh.nodeType) return false;
  if (old.nodeType === TEXT) return (write(old, fresh.data), true);
  if (old.nodeType !== ELEMENT || old.tagName !== fresh.tagName) return false;
  if (fresh.dataset.tex !== undefined || old.dataset.tex !== undefined) return isSameFormula(old, fresh);
  if (old.getAttributeNames().join() !== fresh.getAttributeNames().join()) return false;
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  // highlighted code counts as equal to the same code without highlighting
  if (fresh.tagName !== "CODE" || old.textContent !== fresh.textContent) grow(old, fresh);
  return true;
}

const isDisplay = (span) => span.classList.contains("display");
const isSameFormula = (old, fresh) => old.dataset.tex === fresh.dataset.tex && isDisplay(old) === isDisplay(fresh);

/** Replace a text node's end from the first difference on, so that a selection before it stays. */
function write(node, text) {
  let same = 0;
  while (same < node.length && node.data[same] === text[same]) same += 1;
  if (same < node.length || same < text.length) node.replaceData(same, node.length - same, text.slice(same));
}

/** Change the nodes of a box whose text stays the same, and restore the selection in it. */
export function keepingSelection(box, change) {
  const selection = getSelection();
  const ends = [
    [selection.anchorNode, selection.anchorOffset],
    [selection.focusNode, selection.focusOffset],
  ];
  const places = ends.map(([node, at]) => (box.contains(node) ? before(box, node, at) : null));
  change();
  if (places.every((place) => place === null)) return;
  selection.setBaseAndExtent(...places.flatMap((place, i) => (place === null ? ends[i] : at(box, place))));
}

/** How many characters of a box precede a position. */
function before(box, node, offset) {
  const range = document.createRange();
  range.setStart(box, 0);
  range.setEnd(node, offset);
  return range.toString().length;
}

/** The position after this many characters of a box. */
function at(box, place) {
  const texts = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
  let rest = place;
  while (texts.nextNode()) {
    if (rest <= texts.currentNode.length) return [texts.currentNode, rest];
    rest -= texts.currentNode.length;
  }
  return [box, box.childNodes.length];
}
