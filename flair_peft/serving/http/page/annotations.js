// What a model says of a text, as elements. Whatever a text or a label holds becomes a text node, never markup.

const HUES = 12;
const NO_BREAK = "\u00a0";
const hueOfLabel = new Map();

/** Return a new element with classes, attributes and children; strings become text nodes. */
export function element(name, { classes = "", ...attributes } = {}, ...children) {
  const node = document.createElement(name);
  if (classes) node.className = classes;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Give each label its colour; the same label has the same one in all models. */
export function colourLabels(labels) {
  for (const label of labels) if (!hueOfLabel.has(label)) hueOfLabel.set(label, hueOfLabel.size % HUES);
}

function hue(label) {
  colourLabels([label]);
  return `hue-${hueOfLabel.get(label)}`;
}

/** Return a score in two digits that never claims a certainty which is not there. */
function scoreText(score) {
  if (typeof score !== "number" || !Number.isFinite(score)) return "–";
  if (score < 1 && score >= 0.995) return "> 0.99";
  if (score > 0 && score < 0.005) return "< 0.01";
  return score.toFixed(2);
}

function scored(label, score) {
  // A label may hold characters that turn the direction of what follows: <bdi> keeps them to themselves.
  return [element("bdi", { classes: "label" }, label), element("span", { classes: "score" }, scoreText(score))];
}

/** Return the function from an offset in code points, as Python counts, to one in units of UTF-16. */
function unitsOf(text) {
  if (!/[\ud800-\udbff][\udc00-\udfff]/.test(text)) return (offset) => Math.min(offset, text.length);
  const starts = new Uint32Array(text.length + 1);
  let count = 0;
  for (let unit = 0; unit < text.length; unit += text.codePointAt(unit) > 0xffff ? 2 : 1) starts[count++] = unit;
  starts[count] = text.length;
  return (offset) => starts[Math.min(offset, count)];
}

/** Return the functions that move start and end of a span out of what is seen as one character. */
function wholeCharacters(text) {
  const clusters = new Intl.Segmenter(undefined, { granularity: "grapheme" }).segment(text);
  const isPlain = (unit) => unit > 0x1f && unit < 0x300;
  const move = (offset, after) => {
    if (offset <= 0 || offset >= text.length) return offset;
    if (isPlain(text.charCodeAt(offset - 1)) && isPlain(text.charCodeAt(offset))) return offset;
    const { index, segment } = clusters.containing(offset);
    return index === offset || !after ? index : index + segment.length;
  };
  return { start: (offset) => move(offset, false), end: (offset) => move(offset, true) };
}

/** Return spans with what is drawn of each, `from` and `to` in units of UTF-16, in the order of the text. */
function placed(text, spans) {
  const units = unitsOf(text);
  const whole = wholeCharacters(text);
  return spans
    .map((span) => ({ span, from: whole.start(units(span.start)), to: whole.end(units(span.end)) }))
    .filter(({ from, to }) => from < to)
    .sort((a, b) => a.from - b.from || b.to - a.to);
}

function openMark({ span }, isContinued) {
  const cut = isContinued ? " cut-start" : "";
  const node = element("mark", { classes: `span ${hue(span.entity_group)}${cut}` });
  note(node, span);
  return node;
}

/** Note on an element which span it is, as the server counts. */
function note(node, { start, end, entity_group }) {
  Object.assign(node.dataset, { start, end, label: entity_group });
}

function chip(span) {
  const by = span.model ? [element("bdi", { classes: "by" }, span.model), NO_BREAK] : [];
  const [label, score] = scored(span.entity_group, span.score);
  return element("span", { classes: "chip" }, ...by, label, NO_BREAK, score);
}

const [BLOCK, LONGEST_BLOCK, LONG_TEXT] = [500, 2000, 10000];

/**
 * Return where blocks of the text begin: after line ends, and between words of a line that is very long.
 *
 * A browser lays out only those blocks that are in sight; one block of 10,000 spans would take it seconds.
 */
function blockStarts(text, shortest = BLOCK) {
  const starts = [];
  const whole = wholeCharacters(text);
  for (let start = 0; start < text.length; starts.push(start)) {
    const lineEnd = text.indexOf("\n", start + shortest) + 1 || text.length;
    if (lineEnd - start <= LONGEST_BLOCK) start = lineEnd;
    else {
      const blank = text.lastIndexOf(" ", start + LONGEST_BLOCK) + 1;
      const cut = blank > start ? blank : start + LONGEST_BLOCK;
      start = Math.max(whole.start(cut), start + 1);
    }
  }
  return starts;
}

/** Return a new block at the end of `target`, with the height that so many characters may need until it is laid out. */
function newBlock(target, characters) {
  const block = target.appendChild(element("div", { classes: "block" }));
  block.style.containIntrinsicBlockSize = `auto ${Math.ceil(characters / 50) * 2.4}rem`;
  return block;
}

/** Write the text into `target` with a mark around each span, a block a step. Spans may overlap. */
function* writeMarked(target, text, spans) {
  const open = [];
  const ends = blockStarts(text);
  let position = 0;
  let block = newBlock(target, ends[0]);
  const inner = () => open.at(-1)?.node ?? block;
  const push = (place, isContinued) => {
    const node = inner().appendChild(openMark(place, isContinued));
    open.push({ place, node, height: 0 });
  };
  const close = () => {
    const { place, node, height } = open.pop();
    if (height) node.dataset.height = Math.min(height, 4);
    const outer = open.at(-1);
    if (outer) outer.height = Math.max(outer.height, height + 1);
    if (place.to === position) node.append(chip(place.span));
    else node.classList.add("cut-end");
    return place;
  };
  // Elements cannot overlap: a mark that goes on where one around it ends, or its block, is cut in two.
  const closeWhile = (isLeft) => {
    const closed = [];
    while (open.some(isLeft)) closed.push(close());
    return closed.reverse().filter(({ to }) => to > position);
  };
  function* nextBlock() {
    ends.shift();
    const cut = closeWhile(() => true);
    yield;
    block = newBlock(target, ends[0] - position);
    for (const place of cut) push(place, true);
  }
  function* write(until) {
    while (ends[0] < until) {
      inner().append(text.slice(position, ends[0]));
      position = ends[0];
      yield* nextBlock();
    }
    inner().append(text.slice(position, until));
    position = until;
  }
  function* closeUntil(limit) {
    for (;;) {
      const end = Math.min(...open.map(({ place }) => place.to));
      if (end > limit || !open.length) return;
      yield* write(end);
      for (const place of closeWhile(({ place }) => place.to === end)) push(place, true);
    }
  }
  for (const place of placed(text, spans)) {
    yield* closeUntil(place.from);
    yield* write(place.from);
    if (ends[0] === position) yield* nextBlock();
    push(place, false);
  }
  yield* closeUntil(text.length);
  yield* write(text.length);
}

const LETTER = /\p{L}/u;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

function direction(text) {
  const [letter] = LETTER.exec(text) ?? [];
  return letter && (RIGHT_TO_LEFT.test(letter) ? "rtl" : "ltr");
}

/**
 * Put the parts of a line into `block`, in the direction of its first letter.
 *
 * To a browser a token with its label is one thing without a direction: it would set English words in Arabic ones in
 * the wrong order. Runs of tokens against the direction of the line therefore stand in an element of their own.
 */
function appendInOrder(block, parts) {
  block.dir = parts.find((part) => part.dir)?.dir ?? "ltr";
  let run = block;
  const undecided = [];
  for (const { node, dir } of parts) {
    if (!dir) {
      undecided.push(node);
      continue;
    }
    if (dir === block.dir) run = block;
    else if (run === block) {
      block.append(...undecided.splice(0));
      run = block.appendChild(element("span", { dir }));
    }
    run.append(...undecided.splice(0), node);
  }
  block.append(...undecided);
}

function tokenNode(span, word) {
  const node = element("span", { classes: "token" }, element("span", { classes: "word" }, word));
  note(node, span);
  return node;
}

/** Write the text into `target` with the label of each token under it, a block a step. */
function* writeTokens(target, text, tokens) {
  const ends = blockStarts(text, RIGHT_TO_LEFT.test(text) ? 0 : BLOCK);
  const places = placed(text, tokens);
  let position = 0;
  let index = 0;
  for (const end of ends) {
    const block = newBlock(target, end - position);
    const parts = [];
    const write = (until) => {
      const between = text.slice(position, until);
      if (between) parts.push({ node: between, dir: direction(between) });
      position = Math.max(position, until);
    };
    for (; index < places.length && places[index].from < end; index++) {
      const { span, from, to } = places[index];
      if (from >= position) {
        write(from);
        const word = text.slice(from, to);
        parts.push({ node: tokenNode(span, word), dir: direction(word) });
        position = to;
      }
      // Several tokens of one visible character stand under it together.
      const label = element("span", { classes: `chip ${hue(span.entity_group)}` });
      label.append(...scored(span.entity_group, span.score));
      parts.at(-1).node.append(label);
    }
    write(end);
    appendInOrder(block, parts);
    yield;
  }
}

const SLICE = 12; // milliseconds, a frame has 16

/** Return the text as `write` writes it: its beginning at once, the rest bit by bit while the page can be used. */
function read(text, write, annotations) {
  const node = element("div", { classes: `text read${text.length > LONG_TEXT ? " long" : ""}`, lang: "" });
  const steps = write(node, text, annotations);
  const go = () => {
    const end = performance.now() + SLICE;
    while (performance.now() < end) if (steps.next().done) return true;
    return false;
  };
  const goOn = () => {
    if (!node.isConnected) return;
    if (go()) node.removeAttribute("aria-busy");
    else setTimeout(goOn);
  };
  if (!go()) {
    node.setAttribute("aria-busy", "true");
    setTimeout(goOn);
  }
  return node;
}

/** Return the text with its spans marked. */
function spans(text, answer) {
  const node = read(text, writeMarked, answer);
  return answer.length ? [node] : [node, element("p", { classes: "quiet" }, "Nothing was found in this text.")];
}

/** Return the text with a label under each token. */
function tokens(text, answer) {
  return [read(text, writeTokens, answer)];
}

const BARS = 12;

function bar({ label, score }, isBest) {
  const share = Number.isFinite(score) ? Math.max(0, Math.min(1, score)) : 0;
  const filled = element("span", { classes: "filled" });
  filled.style.inlineSize = `${100 * share}%`;
  return element(
    "li",
    { classes: `bar ${hue(label)}${isBest ? " best" : ""}` },
    ...scored(label, score),
    element("span", { classes: "track", "aria-hidden": "true" }, filled),
  );
}

/** Return labels as bars, the best first; those beyond a screenful can be unfolded. */
function labels(_, answer) {
  if (!answer.length) return [element("p", { classes: "quiet" }, "No label was given to this text.")];
  const bars = answer.map((item, index) => bar(item, index === 0));
  const list = element("ul", { classes: "bars" }, ...bars.slice(0, BARS));
  if (bars.length <= BARS) return [list];
  const rest = element("ul", { classes: "bars" }, ...bars.slice(BARS));
  return [list, element("details", {}, element("summary", {}, `${bars.length - BARS} more labels`), rest)];
}

/** Return the number that a regressor gives. */
function number(_, answer) {
  const { value } = answer;
  return [element("p", { classes: "number" }, Number.isFinite(value) ? String(Number(value.toPrecision(5))) : "–")];
}

function relationEnd(span) {
  return element("span", { classes: `end ${hue(span.entity_group ?? "")}` }, element("bdi", {}, span.word));
}

function relation({ label, score, head, tail }, text) {
  const [words, certainty] = scored(label, score);
  const button = element(
    "button",
    { type: "button", classes: "relation", "aria-pressed": "false" },
    relationEnd(head),
    element("span", { classes: "arrow" }, words, NO_BREAK, certainty),
    relationEnd(tail),
  );
  const both = [head, tail].map(({ start, end }) => `[data-start="${start}"][data-end="${end}"]`).join(",");
  const show = (isOn) => text.querySelectorAll(both).forEach((mark) => mark.classList.toggle("shown", isOn));
  const isPressed = () => button.getAttribute("aria-pressed") === "true";
  button.addEventListener("click", () => button.setAttribute("aria-pressed", String(!isPressed())));
  for (const event of ["pointerenter", "focus", "click"]) button.addEventListener(event, () => show(true));
  for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => show(isPressed()));
  return element("li", {}, button);
}

/** Return the text with all ends of relations marked, and the relations as a list that shows its ends in the text. */
function relations(text, answer) {
  if (!answer.length) return spans(text, []);
  const key = ({ start, end, entity_group }) => `${start} ${end} ${entity_group}`;
  const ends = new Map(answer.flatMap(({ head, tail }) => [head, tail]).map((end) => [key(end), end]));
  const node = read(text, writeMarked, [...ends.values()]);
  return [node, element("ul", { classes: "relations" }, ...answer.map((item) => relation(item, node)))];
}

const RAW = (_, answer) => [element("pre", {}, visibleJson(answer, 2))];
const DRAWN = { labels, spans, tokens, relations, number };

/** Return what shows the answer of a model, or of a task of it, in the form of its kind. */
export function drawn({ kind, tasks }, text, answer) {
  if (kind !== "tasks") return [element("div", { classes: `kind-${kind}` }, ...(DRAWN[kind] ?? RAW)(text, answer))];
  return Object.entries(answer).flatMap(([name, part]) => [
    element("h3", { classes: "task" }, element("bdi", {}, name)),
    ...drawn(tasks?.[name] ?? {}, text, part),
  ]);
}

// Characters that nobody sees, or that turn the direction of others, in a text that somebody copies.
const UNSEEN = /[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** Return a value as JSON in which each character that cannot be seen is written as an escape. */
export function visibleJson(value, indent) {
  const escape = (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return JSON.stringify(value, null, indent).replace(UNSEEN, escape);
}
