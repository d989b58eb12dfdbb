// The form, its requests to this server, and where their answers stand. The token is kept in this module alone.

import * as show from "./annotations.js";

const { element } = show;
const byId = (id) => document.getElementById(id);

const TEXTS = { text: ["text"], pair: ["text", "second"], triple: ["text", "second", "third"] };
const EXAMPLE = {
  text: "Clara Houston of Wellington Museum met Ada Lovelace in London. The guided tour was superb.",
  second: "Two people met.",
  third: "Where did they meet?",
  entities: "Clara Houston = PER\nWellington Museum = ORG\nAda Lovelace = PER\nLondon = LOC",
};

let models = [];
let token = "";
let underWay = null;

// Requests

/** Ask the server; the answer with its headers, or an error with the sentences of the server or of this page. */
async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  // Headers hold bytes: those of the token in UTF-8.
  if (token) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(token))}`;
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Error(
      "This page could not reach its server. Either it has ended, or the connection to it is gone. " +
        "See whether it still runs, then run this again.",
    );
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return { answer, headers: response.headers };
  throw refusal(response, answer);
}

function refusal(response, answer) {
  const wait = response.headers.get("Retry-After");
  const sentences =
    typeof answer?.error === "string"
      ? answer.error
      : `The answer was ${response.status}, without a reason that this page can read. ` +
        "Something between this page and the models may have written it. Look at the log of the server.";
  const error = new Error(wait ? `${sentences} It asks for a pause of ${wait} s.` : sentences);
  error.status = response.status;
  return error;
}

const ticked = () => models.filter((_, index) => byId(`model-${index}`)?.checked);
const canDoWithout = (model) => Boolean(model.adapter) && !model.adapter.merged;
const takes = (model) => (model.takes in TEXTS ? model.takes : "text");

/** Return where each line of the form "Angela Merkel = PER" stands in the text, in code points. */
function entitiesIn(text) {
  const found = [];
  for (const line of byId("entities").value.split("\n")) {
    const [, word, type] = /^(.*\S)\s*=\s*(\S+)\s*$/.exec(line) ?? [];
    if (!word) continue;
    const length = [...word].length;
    let [unit, start] = [0, 0];
    for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
      start += [...text.slice(unit, at)].length;
      unit = at;
      found.push({ start, end: start + length, entity_group: type });
    }
  }
  return found.sort((a, b) => a.start - b.start);
}

function inputsFor(kind) {
  const [text, second, third] = ["text", "second", "third"].map((id) => byId(id).value);
  if (kind === "pair") return { text, text_pair: second };
  if (kind === "triple") return { texts: [text, second, third] };
  if (kind === "entities") return { text, entities: entitiesIn(text) };
  return text;
}

/** Return what is asked: one request for all models that take the same, and one more of them with the adapter off. */
function requests(chosen) {
  const kinds = [...new Set(chosen.map((model) => model.takes))];
  return kinds.flatMap((kind) => {
    const group = chosen.filter((model) => model.takes === kind);
    const asked = [request(kind, group, {})];
    const adapted = group.filter(canDoWithout);
    if (byId("compare").checked && adapted.length) asked.push(request(kind, adapted, { adapter: false }));
    return asked;
  });
}

function request(kind, group, parameters) {
  const names = group.map(({ name }) => name);
  const wantsAll = byId("all-labels").checked && group.some((model) => model.has_all_scores);
  const settings = wantsAll ? { top_k: "all", ...parameters } : parameters;
  const body = { inputs: inputsFor(kind), model: names.length === 1 ? names[0] : names };
  if (Object.keys(settings).length) body.parameters = settings;
  return { body, names, group, isOff: parameters.adapter === false };
}

async function send(asked, signal) {
  try {
    const { answer, headers } = await ask("predict", { body: asked.body, signal });
    const digests = (headers.get("X-Adapter-Digest") ?? "").split(",").map((digest) => digest.trim());
    const bases = (headers.get("X-Base-Fingerprint") ?? "").split(",").map((base) => base.trim());
    return asked.group.map((model, index) => ({
      model,
      isOff: asked.isOff,
      text: textOf(asked.body.inputs),
      answer: asked.names.length === 1 ? answer : answer[model.name],
      digest: digests[index],
      base: bases.length > 1 ? bases[index] : bases[0],
    }));
  } catch (error) {
    if (signal.aborted) throw error;
    return asked.group.map((model) => ({ model, isOff: asked.isOff, error }));
  }
}

const textOf = (inputs) => (typeof inputs === "string" ? inputs : (inputs.text ?? inputs.texts[0]));

/** Run what the form says. Whatever is still under way is given up, and its answer is shown nowhere. */
async function run() {
  stop();
  const chosen = ticked();
  if (!chosen.length) return void say("Tick a model first.");
  if (!byId("text").value) return void say("Write a text first.");
  const mine = new AbortController();
  underWay = mine;
  const asked = requests(chosen);
  const waited = wait();
  try {
    const answers = (await Promise.all(asked.map((item) => send(item, mine.signal)))).flat();
    if (underWay !== mine) return;
    render(answers, asked);
    say(summary(answers, waited()));
    if (answers.some(({ error }) => error?.status === 404)) await loadModels();
    if (answers.some(({ error }) => error?.status === 401)) openAccess();
  } catch (error) {
    if (mine.signal.aborted) return;
    say("The answer cannot be shown: it has a form that this page does not know.");
    throw error;
  } finally {
    if (underWay === mine) stop();
  }
}

// What goes on

let clock = 0;

/** Show that an answer is awaited; returns the function that says for how many milliseconds. */
function wait() {
  const start = performance.now();
  const seconds = () => Math.round((performance.now() - start) / 1000);
  byId("results").setAttribute("aria-busy", "true");
  byId("stop").disabled = false;
  say("Running …");
  clock = setInterval(() => seconds() > 1 && seconds() % 5 === 0 && say(`Still running, for ${seconds()} s …`), 1000);
  return () => performance.now() - start;
}

function stop() {
  clearInterval(clock);
  underWay?.abort();
  underWay = null;
  byId("results").removeAttribute("aria-busy");
  byId("stop").disabled = true;
}

function say(words) {
  byId("status").textContent = words;
}

function summary(answers, milliseconds) {
  const failed = answers.filter(({ error }) => error).length;
  const given = answers.length - failed;
  const parts = [given && `${given} ${given === 1 ? "answer" : "answers"} in ${duration(milliseconds)}`];
  if (failed) parts.push(`${failed} refused`);
  return parts.filter(Boolean).join(", ") + ".";
}

const duration = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;

// Answers

function render(answers, asked) {
  const failures = new Map();
  for (const { model, error } of answers) {
    if (error) failures.set(error.message, [...(failures.get(error.message) ?? []), model.name]);
  }
  byId("problems").replaceChildren(...[...failures].map(([message, names]) => problem(message, names)));
  const given = byId("together").checked ? joined(answers) : answers;
  const groups = new Map();
  for (const item of given.filter(({ error }) => !error)) {
    groups.set(item.model.name, [...(groups.get(item.model.name) ?? []), item]);
  }
  byId("answers").classList.toggle("compared", asked.some(({ isOff }) => isOff));
  byId("answers").replaceChildren(...[...groups.values()].map(group));
  byId("command").hidden = false;
  command = asked.map(curl).join("\n\n");
  const isLong = command.length > MOST_SHOWN;
  const beginning = command.slice(0, MOST_SHOWN).toWellFormed();
  byId("curl").textContent = isLong ? `${beginning} … Copy copies all of it.` : command;
}

function problem(message, names) {
  const who = element("bdi", { classes: "problem-names" }, `${[...new Set(names)].join(", ")}:`);
  return element("p", { classes: "problem" }, who, " ", element("bdi", {}, message));
}

/** Return the answers with those of taggers put together, so that their spans stand in one text. */
function joined(answers) {
  const isTagger = ({ model, error }) => model.kind === "spans" && !error;
  const others = answers.filter((item) => !isTagger(item));
  const both = [false, true].flatMap((isOff) => {
    const taggers = answers.filter((item) => isTagger(item) && item.isOff === isOff);
    if (taggers.length < 2) return taggers;
    const name = taggers.map(({ model }) => model.name).join(" + ");
    const answer = taggers.flatMap((item) => item.answer.map((span) => ({ ...span, model: item.model.name })));
    return [{ ...taggers[0], model: { ...taggers[0].model, name }, answer, parts: taggers }];
  });
  return [...both, ...others];
}

function group(items) {
  const [{ model }] = items;
  const heading = element("h2", { classes: "group-name" }, element("bdi", {}, model.name));
  const panels = element("div", { classes: "panels" }, ...items.map(panel));
  const isCompared = byId("answers").classList.contains("compared");
  if (isCompared && items.length === 1 && !canDoWithout(model)) {
    panels.append(element("p", { classes: "quiet panel" }, "This model has no adapter that could be left out."));
  }
  return element("section", { classes: "group" }, heading, panels);
}

function panel(item) {
  const isNamed = item.model.adapter && byId("answers").classList.contains("compared");
  const state = element("h3", { classes: `state${item.isOff ? " off" : ""}` }, `Adapter ${item.isOff ? "off" : "on"}`);
  const shown = show.drawn(item.model, item.text, item.answer);
  return element("article", { classes: "panel" }, ...(isNamed ? [state] : []), ...shown, proof(item), json(item));
}

/** Return what the headers of the answer say of who gave it. */
function proof(item) {
  const parts = (item.parts ?? [item]).map(({ model, digest, base, isOff }) => ({
    name: model.name,
    adapter: (isOff ? "off" : digest) || "not said",
    base: base || "not said",
  }));
  const code = (words) => element("code", {}, words);
  const short = (value) => (/^[0-9a-f]{16,}$/.test(value) ? value.slice(0, 10) : value);
  const all = (key) => code([...new Set(parts.map((part) => short(part[key])))].join(", "));
  const rows = parts.flatMap(({ name, adapter, base }) => [
    element("dt", {}, "Adapter of ", element("bdi", {}, name)),
    element("dd", {}, code(adapter)),
    element("dt", {}, "Its base"),
    element("dd", {}, code(base)),
  ]);
  const summary = element("summary", {}, "Adapter ", all("adapter"), " · base ", all("base"));
  return element("details", { classes: "proof" }, summary, element("dl", {}, ...rows));
}

/** Return the answer as it came, which is written out only when somebody opens it. */
function json({ answer }) {
  const text = element("pre", { tabindex: "0", role: "region", "aria-label": "JSON", dir: "ltr", translate: "no" });
  const details = element("details", { classes: "json" }, element("summary", {}, "Answer as JSON"), text);
  details.addEventListener("toggle", () => (text.textContent = details.open ? show.visibleJson(answer, 2) : ""));
  return details;
}

let command = "";
const MOST_SHOWN = 5000; // of a command: a browser takes seconds to lay out one of 100,000 characters
const LONGEST_ARGUMENT = 100_000; // bytes; Linux has no room for more than 131,071

/** Return the request as a command for a POSIX shell. The token is left to a variable: commands end up in histories. */
function curl({ body }) {
  const quoted = (words) => `'${words.replaceAll("'", "'\\''")}'`;
  const lines = [`curl ${quoted(new URL("predict", location.href).href)}`, `-H 'Content-Type: application/json'`];
  if (token) lines.push(`-H "Authorization: Bearer $TOKEN"`);
  const json = show.visibleJson(body);
  // A line of JSON begins with a brace: none of it ends the document.
  const isShort = new TextEncoder().encode(json).length < LONGEST_ARGUMENT;
  lines.push(isShort ? `--data-raw ${quoted(json)}` : `--data-binary @- <<'END'\n${json}\nEND`);
  return lines.join(" \\\n  ");
}

async function copy() {
  try {
    await navigator.clipboard.writeText(command);
    byId("copy").textContent = "Copied";
  } catch {
    // Without https, and away from this machine, browsers keep the clipboard to themselves: mark it instead.
    byId("curl").textContent = command;
    getSelection().selectAllChildren(byId("curl"));
    byId("copy").textContent = "Marked: copy it with the keyboard";
  }
  setTimeout(() => (byId("copy").textContent = "Copy"), 3000);
}

// Models

async function loadModels() {
  const before = new Set(ticked().map(({ name }) => name));
  try {
    const { answer } = await ask("info");
    models = answer.models;
    const version = answer.versions?.flair_peft ?? "unknown";
    byId("served").textContent = `${models.length} ${models.length === 1 ? "model" : "models"}, version ${version}`;
  } catch (error) {
    byId("models").replaceChildren(element("p", { classes: "problem" }, element("bdi", {}, error.message)));
    if (error.status === 401) openAccess();
    return;
  }
  for (const model of models) show.colourLabels(model.labels ?? []);
  const first = models.filter((model) => model.takes === models[0].takes).slice(0, 2);
  const isTicked = (model) => (before.size ? before.has(model.name) : first.includes(model));
  const choices = models.map((model, index) => choice(model, index, isTicked(model)));
  const none = element("p", { classes: "quiet" }, "None is loaded.");
  byId("models").replaceChildren(...(choices.length ? choices : [none]));
  showFields();
}

function choice(model, index, isTicked) {
  const input = element("input", { type: "checkbox", id: `model-${index}`, "aria-describedby": `about-${index}` });
  input.checked = isTicked;
  input.addEventListener("change", showFields);
  const base = String(model.base ?? "").split(/[\\/]/).pop();
  const { method = "adapter", r } = model.adapter ?? { method: "no adapter" };
  const names = model.labels ?? [];
  const more = names.length > 6 ? ` and ${names.length - 6} more` : "";
  const about = [model.class, r ? `${method} r=${r}` : method, base && `on ${base}`].filter(Boolean).join(" · ");
  return element(
    "div",
    { classes: "model" },
    input,
    element("label", { for: input.id }, element("bdi", {}, model.name)),
    element(
      "p",
      { id: `about-${index}`, classes: "about" },
      element("bdi", {}, about),
      element("br"),
      element("bdi", { classes: "some-labels" }, names.slice(0, 6).join(", ") + more),
    ),
  );
}

/** Show the fields that the ticked models take. */
function showFields() {
  const wanted = new Set(ticked().flatMap((model) => TEXTS[takes(model)]));
  for (const id of ["second", "third"]) byId(`${id}-field`).hidden = !wanted.has(id);
  byId("entities-field").hidden = !ticked().some((model) => model.takes === "entities");
}

function openAccess() {
  byId("access").open = true;
}

// The form

function useToken() {
  token = byId("token").value.trim();
  loadModels();
}

function runExample() {
  for (const [id, value] of Object.entries(EXAMPLE)) byId(id).value = value;
  run();
}

byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) {
    event.preventDefault();
    run();
  }
});
byId("token").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  useToken();
});
byId("token").addEventListener("input", () => (token = byId("token").value.trim()));
byId("use-token").addEventListener("click", useToken);
byId("stop").addEventListener("click", () => {
  stop();
  say("Stopped.");
});
byId("example").addEventListener("click", runExample);
byId("copy").addEventListener("click", copy);
loadModels();
