"""Markdown in the browser: incremental parsing equals a full one, money is not mathematics, model output is inert."""

import random
from typing import Any

import pytest

from finback.serve.page import Page
from tests.test_page_browser import CHROMIUM, Opened, answered, bring, chromium, expect, history, opened, say, talking

__all__ = ["chromium", "opened"]  # fixtures
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: see tests/test_page_browser.py")

FRAGMENTS = [
    "# Title\n",
    "## Two\n\n",
    "plain words ",
    "**bold**",
    "*it*",
    "`code`",
    "\n",
    "\n\n",
    "\n\n\n",
    "- item\n",
    "- [ ] task\n",
    "  more of it\n",
    "    indented\n",
    "1. one\n",
    "2. two\n",
    "10) ten\n",
    "* star\n",
    "> quote\n",
    "> > deeper\n",
    "lazy\n",
    "```python\n",
    "```\n",
    "~~~\n",
    "````\n",
    "$$\n",
    "$a$",
    "$$x = 1$$",
    "$$\nx\n\ny\n$$\n",
    "\\[\n",
    "\\begin{align}\n",
    "\n\\end{align}\n",
    "**注意：**正文",
    "3~5天",
    "https://a.b/c，",
    "<br>",
    "H<sub>2</sub>O",
    "\\(b\\)",
    "\\[\nc\n\\]\n",
    "$5 and $6",
    "| a | b |\n",
    "|---|:-:|\n",
    "| 1 | 2 |\n",
    "---\n",
    "===\n",
    "***\n",
    "<div>\n",
    "</div>\n",
    "<!-- x -->\n",
    "<script>",
    "[link](http://a.b)",
    "[ref]",
    "[ref]: http://c.d\n",
    "![pic](http://e.f/g.png)",
    "https://h.i/j",
    "a\\\nb",
    "  \n",
    "\t",
    "\r\n",
    "\r",
    "&amp; &lt;",
    "\\*",
    "~~gone~~",
    "_under_",
    "+ b\n",
    "- b\n- c\n\n- d\n",
    "    \n",
]
WHOLE = [
    "para\n\n- a\n\n  still a\n- b\n\nafter\n\n1. x\n\n   y\n2. z\n\nend",
    "```js\nlet a = 1;\n\n\nlet b;\n```\n\ntext\n\n    code\n\n    more\n\ntext",
    "> a\n> b\n\n> c\nlazy\n\n- > q\n\n  r\n\ndone",
    "a | b\n-|-\n1 | 2\n\nx\n\n| c |\n|-|\n",
    "$$\na\n+ b\n- c\n$$\n\n\\[\nx\n\\]\n\n$$\nopen\n\nnever closed",
    "so\n$$\na\n\n- b\n\n\nc\n\nd\n\ne\n$$\nthen\n\\begin{align}\nx\n\ny\n\nz\n\\end{align}\n\nf\n\ng\n\nh\n",
    "Title\n===\n\nSub\n---\n\ntext\n***\n",
    "1. a\n   ```\n   b\n\n   c\n   ```\n2. d\n\n\n\n3. e\n\npara\n\n[x]: http://y\n\n[x]\n\n[x]",
    "- a\n\n\n- b\n\n      deep\n\n  c\n\n\nd\n\n\ne\n\n\nf\n",
]
FAR = "$$\nfar\n\n" + "long words\n\n" * 600 + "$$\n"  # a closing delimiter that comes too late

COMPARE = """async ({ parser, texts }) => {
  const { Growing, htmlOfAll } = await import(parser);
  const wrong = [];
  let settled = 0;
  for (const { text, cuts } of texts) {
    const growing = new Growing();
    let at = 0;
    for (const cut of cuts) {
      growing.push(text.slice(at, cut));
      at = cut;
      const whole = htmlOfAll(text.slice(0, cut));
      if (growing.html !== whole) { wrong.push({ text: text.slice(0, cut), growing: growing.html, whole }); break; }
    }
    settled += growing.settled;
  }
  return { wrong, settled };
}"""


# the first differences between text that is drawn incrementally and text that is drawn at once
GROWN = """async ({ view, texts }) => {
  const { MarkdownView } = await import(view);
  const wrong = [];
  for (const { text, cuts } of texts) {
    const [grown, whole] = [0, 1].map(() => document.body.appendChild(document.createElement('div')));
    const growing = new MarkdownView(grown);
    for (const cut of cuts) growing.show(text.slice(0, cut), cut === text.length);
    new MarkdownView(whole).show(text, true);
    for (let i = 0; i < 200 && grown.innerHTML !== whole.innerHTML; i++) await new Promise((d) => setTimeout(d, 20));
    if (grown.innerHTML !== whole.innerHTML) wrong.push([text, grown.innerHTML, whole.innerHTML]);
    grown.remove();
    whole.remove();
  }
  return wrong;
}"""

# what stays while a table, a paragraph and a code block grow: the scroll position, the selected words
KEPT = r"""async (view) => {
  const { MarkdownView } = await import(view);
  const root = document.getElementById('app').appendChild(document.createElement('div'));
  root.className = 'prose';
  root.style.width = '200px';
  const growing = new MarkdownView(root);
  const found = [];
  let text = '';
  const add = async (more, isThere, done = false) => {
    growing.show((text += more), done);
    while (!isThere()) await new Promise((d) => setTimeout(d, 5));
  };
  const one = (selector) => root.querySelector(selector);
  const select = (selector) => getSelection().setBaseAndExtent(one(selector).firstChild, 0, one(selector).firstChild, 3);
  await add(`| ${'long | '.repeat(30)}\n|${'-|'.repeat(30)}\n| one `, () => one('td'));
  one('.scroll').scrollLeft = 50;
  select('td');
  await add('| two', () => root.textContent.includes('two'));
  await add(' |\n| three | *four*', () => one('td em'));
  found.push(one('.scroll').scrollLeft, String(getSelection()));
  await add(' |\n\nfirst **se', () => one('p'));
  select('p');
  await add('cond** third\n\n```python\nprint(1)\n', () => one('code'));
  found.push(String(getSelection()), one('strong').textContent);
  select('code');
  await add('```\n\nend', () => one('code span'), true);
  found.push(String(getSelection()));
  root.remove();
  return found;
}"""


def cut(text: str, most: int, rng: random.Random) -> dict[str, Any]:
    """A text and the points at which it is cut into pieces of up to `most` characters."""
    cuts = [0]
    while cuts[-1] < len(text):
        cuts.append(min(len(text), cuts[-1] + rng.randint(1, most)))
    return {"text": text, "cuts": cuts[1:]}


def compared(page: Any, texts: list[str], most: int) -> dict[str, Any]:
    """The first prefix of each text where incremental and full parsing differ, in pieces of up to `most` characters."""
    rng = random.Random(most)
    given = [cut(text, most, rng) for text in texts]
    found: dict[str, Any] = page.evaluate(
        COMPARE, {"parser": f"/web/{Page().digest}/markdown/parser.js", "texts": given}
    )
    return found


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_growing_equals_the_whole_for_every_prefix(opened: Opened, most: int) -> None:
    with talking() as client:
        page = opened(client)
        rng = random.Random(most)
        texts = ["".join(rng.choices(FRAGMENTS, k=rng.randint(5, 60))) for _ in range(40 + 5 * most)]
        found = compared(page, [*WHOLE, *texts, "\n\n".join(WHOLE)], most)
        assert found["wrong"] == []
        assert found["settled"] > 30  # most of a text is not parsed again
        assert compared(page, [FAR], 600)["wrong"] == []
        view = f"/web/{Page().digest}/markdown/view.js"
        drawn_texts = [cut(text, 12, rng) for text in [*WHOLE, *(text for text, *_ in WORLD), *texts[:16]]]
        assert page.evaluate(GROWN, {"view": view, "texts": drawn_texts}) == []
        assert page.evaluate(KEPT, view) == [50, "one", "fir", "second", "pri"]


def drawn(opened: Opened, client: Any, texts: list[str]) -> Any:
    """A page with answers that contain the texts."""
    page = opened(client)
    content = history(len(texts))
    for i, text in enumerate(texts):
        content["chats"][0]["nodes"][f"assistant{i}"]["content"] = text
    bring(page, content)
    expect(page.locator(".assistant")).to_have_count(len(texts))
    return page


FORMULAS = [
    ("It costs $5 and $6.", 0),
    ("From $1,000 to $2,000, or $3-$4.", 0),
    ("a $x$ b", 1),
    ("$$x^2$$", 1),
    ("\\(y\\) and \\[z\\]", 2),
    ("`$x$`", 0),
    ("```\n$x$\n```", 0),
    ("$\\frac{1}{2}$, $a_1$ and $5", 2),
    ("\\$x\\$", 0),
    ("$ x $", 0),
    ("$$\n\\begin{aligned}\na &= b \\\\\n- c &= d\n\\end{aligned}\n$$", 1),
]
# text, selector, what the first answer shows for it: [] for nothing
WORLD: list[tuple[str, str, list[str]]] = [
    ("**注意：**正文", "strong", ["注意："]),
    ("**“你好”**然后**（甲）**乙", "strong", ["“你好”", "（甲）"]),
    (
        "**Python (3.12)**版本, **스크립트(script)**라고, 中*强*调",
        "strong, em",
        ["Python (3.12)", "스크립트(script)", "强"],
    ),
    ("**これは「強調」**です。a * b * c", "strong, em", ["これは「強調」"]),
    ("**bold**, *it*, 2*3*4, snake_case_name and a**(b)**c", "strong, em", ["bold", "it", "3"]),
    ("3~5天，6~8天", "del", []),
    ("~~旧：~~新 ~~old~~", "del", ["旧：", "old"]),
    ("见 https://a.b/c?d=e，然后（https://f.g/h）。", "a", ["https://a.b/c?d=e", "https://f.g/h"]),
    ("https://a.b/百科/条目。https://c.d/e.", "a", ["https://a.b/百科/条目", "https://c.d/e"]),
    ("انظر https://a.b/c، ثم https://d.e/f؟", "a", ["https://a.b/c", "https://d.e/f"]),
    ("देखें https://a.b/c।", "a", ["https://a.b/c"]),
    ("H<sub>2</sub>O and x<SUP>2</SUP>", "sub, sup", ["2", "2"]),
    ("<sub onclick=x>no</sub> <div>no</div>", "sub, div > div > div", []),
    ("one<br>two<br/>three", "br", ["", ""]),
    ("\\begin{align}\na &= b \\\\\n\nc &= d\n\\end{align}\n\nafter", ".math:not(.wrong) > math", [""]),
    ("so \\begin{pmatrix} a \\\\ b \\end{pmatrix} here", ".math:not(.wrong) > math", [""]),
    ("$$\na\n\n+ b\n$$\nand\n\\[\nc\n\n\\]", ".math:not(.wrong) > math", ["", ""]),
    ("$$ is the PID.\n\nMore words.\n\n$$ again.", ".math", []),
]
DIRECTIONS = "المسافة 3 كم\n\n- أول\n- second\n\nEnglish مع\n\n```\ncode\n```\n\n| من | كم |\n|---|---|\n| أ | 2 |"
TALL = "$$\\left(\\begin{matrix}a\\\\b\\\\c\\\\d\\\\e\\end{matrix}\\right] \\left\\{\\sqrt{\\frac{\\frac{1}{2}}{\\frac{3}{4}}}\\right\\rangle$$"
# whether the page's font has loaded, and how tall the brackets around the matrix are relative to it
GROWN_SIGNS = """async (box) => {
  const [font] = [...document.fonts].filter((f) => f.family.includes('of the page'));
  const math = box.querySelector('math');
  const high = (element) => element.getBoundingClientRect().height;
  await font.load();
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const table = math.querySelector('mtable');
  const signs = [...math.querySelectorAll('mo')].map((sign) => high(sign) / high(table));
  return [font.status, getComputedStyle(math).fontFamily.includes(font.family.replaceAll('"', '')), signs];
}"""
# invalid mathematics stays readable as text
BROKEN = ["$\\frac{1$ and $\\undefined{x}$", "$" + "{" * 500 + "x" + "}" * 500 + "$", "$\\def\\a{\\a\\a}\\a$"]


def test_mathematics_money_and_texts_of_the_world(opened: Opened) -> None:
    with talking() as client:
        texts = [*(text for text, _ in FORMULAS), *BROKEN, TALL, *(text for text, *_ in WORLD), DIRECTIONS]
        page = drawn(opened, client, texts)
        answers = page.locator(".assistant")
        for i, (text, count) in enumerate(FORMULAS):
            assert answers.nth(i).locator("math").count() == count, text
            assert answers.nth(i).locator(".math.wrong").count() == 0, text
        assert "\\frac{1" in answers.nth(len(FORMULAS)).inner_text()
        status, is_used, signs = answers.nth(len(FORMULAS) + len(BROKEN)).evaluate(GROWN_SIGNS)
        assert status == "loaded" and is_used
        assert len(signs) == 4 and min(signs[:2]) > 0.85 and 0.3 < min(signs[2:]) < max(signs[2:]) < 0.9, signs
        for answer, (text, where, wanted) in zip(answers.all()[-len(WORLD) - 1 :], WORLD, strict=False):
            found = answer.locator(".prose").locator(where)
            assert found.count() == len(wanted), text
            assert all(not w or w == f for w, f in zip(wanted, found.all_inner_texts(), strict=True)), text
        sides = answers.last.locator(".prose > div > *").evaluate_all(
            "all => all.map(e => [e.tagName, getComputedStyle(e).direction])"
        )
        assert sides == [["P", "rtl"], ["UL", "rtl"], ["P", "ltr"], ["DIV", "ltr"], ["DIV", "rtl"]]
        page.fill("#say", "שלום")
        assert page.evaluate("getComputedStyle(document.getElementById('say')).direction") == "rtl"
        composing(page)


KEYS = """([key, more]) => document.activeElement.dispatchEvent(
  new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true, ...more }))"""


def composing(page: Any) -> None:
    """Enter and Escape in input method composition neither send nor close anything, nor does Safari's variant (229)."""
    before = page.locator(".message").count()
    page.focus("#say")
    for more in ({"isComposing": True}, {"keyCode": 229}):
        for key in ("Enter", "Escape"):
            page.evaluate(KEYS, [key, more])
    assert page.input_value("#say") == "שלום" and page.locator(".message").count() == before
    page.locator(".bubble").last.hover()
    page.locator(".message.user [aria-label=Edit]").last.click()
    for more in ({"isComposing": True}, {"keyCode": 229}):
        for key in ("Enter", "Escape"):
            page.evaluate(KEYS, [key, more])
    expect(page.locator(".editor textarea")).to_be_focused()
    page.evaluate(KEYS, ["Escape", {}])
    expect(page.locator(".editor")).to_have_count(0)


PAYLOADS = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit=2'>",
    "<svg onload=window.hit=3>",
    "[click](javascript:window.hit=4)",
    "[a](JaVaScRiPt:window.hit=5)",
    "[b](data:text/html,<script>window.hit=6</script>)",
    "![x](https://evil.example/pixel.png)",
    "<iframe src=https://evil.example></iframe>",
    "<a href='javascript:window.hit=7'>x</a>",
    "$\\href{javascript:window.hit=8}{x}$",
    "$\\includegraphics{https://evil.example/a.png}$",
    "```<img src=x onerror=window.hit=9>\n<img src=x onerror=window.hit=10>\n```",
    "```html\n<img src=x onerror=window.hit=11>\n```",
    "| <img src=x onerror=window.hit=12> |\n|---|\n| <b onclick=window.hit=13>x</b> |",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=14>",
    "<style>* { display: none }</style>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "[x](<java\nscript:window.hit=15>)",
    "<form action=https://evil.example><button>x</button></form>",
    "$<img src=x onerror=window.hit=16>$",
    "\\[<script>window.hit=17</script>\\]",
    "&lt;img src=x onerror=window.hit=18&gt;",
    "<<img src=x onerror=window.hit=19>",
    "<vbscript:x> [y](vbscript:z)",
    '!["onerror="window.hit=20](x)',
    '[" onmouseover="window.hit=21](http://x)',
    "<details open ontoggle=window.hit=22>",
    "<span data-tex='\\href{javascript:1}{x}' class=math>x</span>",
    "<base href=https://evil.example>",
]


# two frames and a turn of the event loop, after which any effect has begun
SETTLED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"


def test_what_a_model_says_does_nothing(opened: Opened) -> None:
    title = "<img src=x onerror=window.hit=23>"
    with talking(
        "<think><img src=x onerror=window.hit=24></think><script>window.hit=25</script>![x](https://evil.example/y.png)"
    ) as client:
        page = drawn(opened, client, PAYLOADS)
        bring(page, history(1, text=PAYLOADS[1], title=title))
        expect(page.locator(".sidebar .name")).to_have_text(title)
        page.click(f'[aria-label="More for {title}"]')
        page.keyboard.press("Escape")
        say(page, PAYLOADS[0])
        answered(page)
        page.click(".summary")
        page.evaluate(SETTLED)
        assert page.evaluate("window.hit") is None
        found = page.evaluate(
            """() => ({
              tags: document.querySelectorAll('.message :is(script, img, iframe, style, link, form, base, object, embed, input, details)').length,
              handlers: [...document.querySelectorAll('.message *')].filter(e => [...e.attributes].some(a => a.name.startsWith('on') || a.name === 'style' && !e.closest('math'))).length,
              links: [...document.querySelectorAll('.message a')].map(a => a.protocol).filter(p => !['http:', 'https:', 'mailto:'].includes(p) && p !== ':'),
            })"""
        )
        assert found == {"tags": 0, "handlers": 0, "links": []}
        # each prefix of a payload is also drawn during streaming
        found = page.evaluate(
            """async ({ view, texts }) => {
              const { MarkdownView } = await import(view);
              const root = document.createElement('div');
              document.body.append(root);
              for (const text of texts) {
                const drawn = new MarkdownView(root);
                root.replaceChildren();
                for (let i = 1; i <= text.length; i++) { drawn.show(text.slice(0, i), true); }
              }
              await new Promise((done) => setTimeout(done, 50));
              return [window.hit ?? null, root.querySelectorAll('script, img, iframe, style').length];
            }""",
            {"view": f"/web/{Page().digest}/markdown/view.js", "texts": PAYLOADS},
        )
        assert found == [None, 0]
