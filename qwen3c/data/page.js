"use strict";

// ---- elements and words

const at = id => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter(child => child !== null));
  return made;
}
function button(label, act, properties = {}) {
  const made = element("button", { type: "button", ...properties }, label);
  made.addEventListener("click", act);
  return made;
}
const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const seconds = s => `${s < 9.95 ? s.toFixed(1) : Math.round(s)} s`;
function ordinal(n) {
  const ending = n % 100 >= 11 && n % 100 <= 13 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th";
  return `${n}${ending}`;
}
function toBox() {  // where the focus belongs; on a phone it would bring up the keyboard
  if (!matchMedia("(pointer: coarse)").matches) at("box").focus();
}
const press = (id, act) => at(id).addEventListener("click", act);
function say(text) {  // to a screen reader; what is long is in the log, which speaks for itself
  at("status").textContent = text;
}
function notice(text) {
  at("notice-text").textContent = text;
  at("notice").hidden = !text;
}
async function copy(text, pressed) {
  const label = pressed.textContent;
  try {
    await writeClipboard(text);
    pressed.textContent = "copied";
  } catch {
    pressed.textContent = "not allowed";
  }
  setTimeout(() => { pressed.textContent = label; }, 1500);
}
async function writeClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = element("textarea", { value: text, className: "unseen" });  // a page from another machine without TLS has no clipboard
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  toBox();
  if (!done) throw new Error("refused");
}

// Control characters become pictures of themselves, and what reorders text becomes its number: what is copied is what was seen.
const CONTROLS = /[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;
function visible(control) {
  const code = control.charCodeAt(0);
  return code < 0x20 ? String.fromCharCode(0x2400 + code) : code === 0x7f ? "\u2421" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}
const clean = text => text.replace(/\r\n?/g, "\n").replace(CONTROLS, visible);

// ---- markdown: marked reads it, only elements and text nodes come out

const LONG = 4000;  // characters of a paragraph: beyond it emphasis and bare addresses, whose search is quadratic, stay text
const DEEP = 24;    // quotes, lists, emphasis and links in each other: beyond it markers stay text
const HUGE = 20000;  // characters of a block that is not code: beyond it, it is shown in pieces, unread, as a browser takes seconds for a line of 1 MB
class BoundedTokenizer extends marked.Tokenizer {
  depth = 0;
  nested(read) {
    if (this.depth >= DEEP) return undefined;
    this.depth++;
    try { return read(); } finally { this.depth--; }
  }
  blockquote(source) { return this.nested(() => super.blockquote(source)); }
  list(source) { return this.nested(() => super.list(source)); }
  link(source) { return this.nested(() => super.link(source)); }
  reflink(source, links) { return this.nested(() => super.reflink(source, links)); }
  emStrong(source, masked, before) { return masked.length > LONG ? undefined : this.nested(() => super.emStrong(source, masked, before)); }
  del(source, masked, before) { return source.length > LONG ? undefined : this.nested(() => super.del(source, masked, before)); }
  url(source) { return source.length > LONG ? undefined : super.url(source); }
}
function lex(text) {
  try {
    const tokens = new marked.Lexer({ ...marked.getDefaults(), tokenizer: new BoundedTokenizer() }).lex(text);
    return tokens.flatMap(token => token.raw.length > HUGE && token.type !== "code" ? pieces(token.raw) : [token]);
  } catch {  // what marked cannot read is shown as it is
    return pieces(text);
  }
}
const pieces = text => (text.match(/[^]{1,10000}/g) ?? []).map(part => ({ type: "html", raw: part, text: part }));

const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", deg: "°", plusmn: "±", times: "×", middot: "·", hellip: "…", ndash: "–", mdash: "—", larr: "←", rarr: "→", le: "≤", ge: "≥", ne: "≠", euro: "€", pound: "£", bull: "•", laquo: "«", raquo: "»" };
function decoded(text) {  // and clean again: marked, too, makes characters of numbers
  return clean(text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|([a-z]+));/gi, (whole, decimal, hex, name) => {
    if (name) return ENTITIES[name] ?? whole;
    const code = decimal ? Number(decimal) : parseInt(hex, 16);
    return code > 0 && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) ? String.fromCodePoint(code) : "\ufffd";
  }));
}

const inlines = tokens => (tokens ?? []).map(inline);
function inline(token) {
  switch (token.type) {
    case "text": return token.tokens ? element("span", {}, ...inlines(token.tokens)) : document.createTextNode(decoded(token.text));
    case "escape": return document.createTextNode(token.text);
    case "strong": case "em": case "del": return element(token.type, {}, ...inlines(token.tokens));
    case "codespan": return element("code", {}, token.text);
    case "br": return element("br");
    case "link": return link(token);
    case "image": return element("span", { className: "image" }, `[image: ${decoded(token.text)}] ${token.href}`);  // fetching it would tell its server what was said
    case "checkbox": return document.createTextNode(token.checked ? "☑ " : "☐ ");
    default: return document.createTextNode(token.raw);
  }
}
function link(token) {
  const address = decoded(token.href);
  if (/^https?:\/\//i.test(address)) return element("a", { href: address, rel: "noopener noreferrer", target: "_blank", title: address }, ...inlines(token.tokens));
  return element("span", {}, ...inlines(token.tokens), token.text === address ? "" : ` (${address})`);
}
function block(token) {
  switch (token.type) {
    case "space": case "def": return null;
    case "paragraph": return element("p", {}, ...inlines(token.tokens));
    case "heading": return element("h3", { className: `depth-${token.depth}` }, ...inlines(token.tokens));  // all h3: the page's own outline has no holes
    case "code": return codeBlock(token);
    case "hr": return element("hr");
    case "blockquote": return element("blockquote", {}, ...blocks(token.tokens));
    case "list": return list(token);
    case "table": return table(token);
    case "html": return element("p", { className: "raw" }, token.text.trimEnd());
    default: return inline(token);
  }
}
const blocks = tokens => tokens.map(block).filter(node => node !== null);
function list(token) {
  const items = token.items.map(item => element("li", { className: item.task ? "task" : "" }, ...blocks(item.tokens)));
  const made = element(token.ordered ? "ol" : "ul", {}, ...items);
  if (token.ordered && token.start !== 1) made.start = token.start;
  return made;
}
function table(token) {
  const cells = (row, tag) => row.map(cell => element(tag, { className: cell.align === "right" || cell.align === "center" ? `to-${cell.align}` : "" }, ...inlines(cell.tokens)));
  const head = element("thead", {}, element("tr", {}, ...cells(token.header, "th")));
  const body = element("tbody", {}, ...token.rows.map(row => element("tr", {}, ...cells(row, "td"))));
  return element("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": "Table" }, element("table", {}, head, body));
}
function codeBlock(token) {
  const language = (token.lang ?? "").trim().split(/\s/)[0].slice(0, 30);
  const text = document.createTextNode(token.text);
  const copier = button("copy", () => copy(text.data, copier), { className: "plain", "aria-label": "copy the code" });
  const made = element("figure", { className: "code" }, element("figcaption", {}, element("span", {}, language || "text"), copier),
    element("pre", { tabIndex: 0, role: "group", "aria-label": `Code${language && ", " + language}` }, element("code", {}, text)));
  made.growing = { language: token.lang, text };
  return made;
}

// A reply as it grows. All blocks but the last are settled: they are neither read nor drawn again.
class Prose {
  node = element("div", { className: "prose" });
  text = "";
  settled = 0;  // characters of `text` in settled blocks
  last = [];    // nodes of the last block
  show(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) this.clear();
    this.text = text;
    const tokens = lex(text.slice(this.settled));
    const end = Math.max(0, tokens.findLastIndex(token => token.type !== "space"));
    if (end === 0 && this.grows(tokens[0])) return;
    for (const node of this.last) node.remove();
    this.node.append(...blocks(tokens.slice(0, end)));
    this.last = blocks(tokens.slice(end));
    this.node.append(...this.last);
    this.settled += tokens.slice(0, end).reduce((sum, token) => sum + token.raw.length, 0);
  }
  grows(token) {  // long code gets its new characters, not a new element
    const growing = token?.type === "code" && this.last[0]?.growing;
    if (!growing || growing.language !== token.lang) return false;
    if (token.text.startsWith(growing.text.data)) growing.text.appendData(token.text.slice(growing.text.length));
    else growing.text.data = token.text;
    return true;
  }
  finish(text) {  // a definition of a link may come after what refers to it
    if (text !== this.text && /^ {0,3}\[[^\]\n]+\]:/m.test(text)) this.clear();
    this.show(text);
  }
  clear() {
    this.node.replaceChildren();
    Object.assign(this, { text: "", settled: 0, last: [] });
  }
}

// ---- what the browser keeps: one record for each conversation and one for each message

const tabs = new BroadcastChannel("qwen3c");
const completed = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
const store = {
  database: null,
  memory: { conversations: new Map(), messages: new Map() },  // where the browser keeps nothing

  async open() {
    const request = indexedDB.open("qwen3c", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    this.database = await completed(request);
  },
  change(kinds, act) {  // all of it or nothing
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(kinds, "readwrite");
      act(kind => transaction.objectStore(kind));
      transaction.oncomplete = () => resolve();
      transaction.onabort = () => reject(transaction.error);
    });
  },
  async put(records) {  // {kind: [record, ...]}
    if (!this.database) return Object.entries(records).forEach(([kind, list]) => list.forEach(record => this.memory[kind].set(record.id, record)));
    await this.change(Object.keys(records), of => Object.entries(records).forEach(([kind, list]) => list.forEach(record => of(kind).put(record))));
    if (records.conversations) tabs.postMessage("changed");
  },
  async all(kind, conversation) {
    if (!this.database) return [...this.memory[kind].values()].filter(record => !conversation || record.conversation === conversation);
    const records = this.database.transaction(kind).objectStore(kind);
    return completed(conversation ? records.index("conversation").getAll(conversation) : records.getAll());
  },
  async remove(ids) {  // conversations with their messages
    const messages = (await Promise.all(ids.map(id => this.all("messages", id)))).flat().map(message => message.id);
    if (!this.database) return void [ids, messages].forEach((list, i) => list.forEach(id => this.memory[["conversations", "messages"][i]].delete(id)));
    await this.change(["conversations", "messages"], of => {
      ids.forEach(id => of("conversations").delete(id));
      messages.forEach(id => of("messages").delete(id));
    });
    tabs.postMessage("changed");
  },
  async removeMessage(id) {
    if (!this.database) return void this.memory.messages.delete(id);
    await this.change(["messages"], of => of("messages").delete(id));
  },
};
async function keep(records) {
  try {
    await store.put(records);
  } catch (error) {
    notice(`This could not be kept in the browser: ${error?.message ?? "its storage is full"}`);
  }
}
const remembered = {  // small things: settings, theme, tools on or off
  get(name) { try { return JSON.parse(localStorage.getItem(`qwen3c.${name}`)); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(`qwen3c.${name}`, JSON.stringify(value)); } catch { /* then for this visit only */ } },
};

// ---- a conversation: a tree of messages, and the leaf of the branch that is shown

let clock = 0;
const moment = () => clock = Math.max(Date.now(), clock + 1);  // no two alike, so that they order messages
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), byte => byte.toString(16).padStart(2, "0")).join("");

class Tree {
  constructor(conversation, messages = []) {
    this.conversation = conversation;
    this.messages = new Map();
    this.below = new Map();   // id of a message, or null -> the messages under it, oldest first
    this.chosen = new Map();  // ... -> the one last shown
    messages.sort((a, b) => a.created - b.created).forEach(message => this.place(message));
    this.select(this.messages.get(conversation.leaf) ?? messages.at(-1));
  }
  place(message) {
    this.messages.set(message.id, message);
    this.below.set(message.parent, [...this.below.get(message.parent) ?? [], message]);
  }
  add(fields) {
    const message = { id: newId(), conversation: this.conversation.id, created: moment(), content: "", state: "done", ...fields };
    this.place(message);
    this.select(message);
    return message;
  }
  remove(message) {
    this.messages.delete(message.id);
    this.below.set(message.parent, this.versions(message).filter(other => other !== message));
    this.select(this.messages.get(message.parent));
    return store.removeMessage(message.id);
  }
  versions(message) { return this.below.get(message.parent) ?? []; }
  select(message) {  // and on down the branch that was last shown below it
    for (let next = message; next; next = this.chosen.get(next.id) ?? this.below.get(next.id)?.at(-1)) message = next;
    this.conversation.leaf = message?.id ?? null;
    for (const one of this.path()) this.chosen.set(one.parent, one);
  }
  path(leaf = this.messages.get(this.conversation.leaf)) {
    const path = [];
    for (let one = leaf; one; one = this.messages.get(one.parent)) path.push(one);
    return path.reverse();
  }
  result(message, call) { return [...this.messages.values()].find(one => one.of === message.id && one.callId === call.id); }
  async save(...messages) {
    if (!conversations.includes(this.conversation)) return;  // deleted while a reply was being written
    this.conversation.updated = Date.now();
    await keep({ conversations: [this.conversation], messages });
  }
}

// ---- the server

class Failure extends Error {  // what went wrong, in words for whoever reads it
  constructor(message, code = "", again = "retry") {
    super(message);
    Object.assign(this, { code, again });
  }
}
let keyQuestion = null;
function askKey(refused) {  // one question, however many requests wait for its answer
  keyQuestion ??= question({
    title: "API key", text: refused ? "The server did not accept that key." : "This server wants a key. It is kept until this tab is closed.",
    input: { type: "password", value: "", "aria-label": "API key" }, choices: ["Cancel", "Use key"],
  }).then(answer => {
    if (answer.choice === "Use key" && answer.text) sessionStorage.setItem("qwen3c.key", answer.text.trim());
    return answer.choice === "Use key" && Boolean(answer.text);
  }).finally(() => { keyQuestion = null; });
  return keyQuestion;
}
async function request(path, { body, signal, headers = {} } = {}) {
  for (;;) {
    const key = sessionStorage.getItem("qwen3c.key");
    const sent = { ...headers, ...body && { "Content-Type": "application/json" }, ...key && { Authorization: `Bearer ${key}` } };
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers: sent, body: body && JSON.stringify(body), signal, cache: "no-store", redirect: "error" });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Failure("The server cannot be reached.", "unreachable");
    }
    if (response.status === 401 && (sessionStorage.getItem("qwen3c.key") !== key || await askKey(Boolean(key)))) continue;
    if (!response.ok) throw await failure(response);
    return response;
  }
}
async function failure(response) {
  const body = await response.json().catch(() => null);
  const after = Number(response.headers.get("retry-after"));
  const made = failureOf(body?.error ?? { message: `The server answered ${response.status} ${response.statusText}`.trim() + "." }, response.status);
  if (after > 0) made.message += ` Try again in ${seconds(after)}.`;
  made.status = response.status;
  return made;
}
function failureOf(error, status) {
  const message = typeof error?.message === "string" ? clean(error.message) : "The server failed without a word.";
  if (error?.code === "context_length_exceeded") {
    const sizes = Number.isFinite(error.n_prompt_tokens) && Number.isFinite(error.n_ctx) ? `This conversation is ${counted(error.n_prompt_tokens, "token")} long, and the model holds ${error.n_ctx.toLocaleString("en")}. ` : `${message} `;
    return new Failure(`${sizes}Begin a new chat, or edit an earlier message to leave something out.`, error.code);
  }
  if (error?.code === "upstream_interrupted") return new Failure("The cloud's reply was cut off before its end. Nothing was made up to fill the gap.", error.code, "local");
  return new Failure(status === 401 ? `${message} Without a key nothing is answered.` : message, String(error?.code ?? ""));
}
async function* events(response) {  // the data of server-sent events, as JSON; "[DONE]" ends them
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;  // a ping is a comment
      const data = line.slice(5).trim();
      if (data === "[DONE]") return void reader.cancel();
      yield JSON.parse(data);
    }
  }
}

const server = { props: null, models: [], tools: [] };
async function meet() {  // what the server is: called at the start, and again until it answers
  const models = await (await request("/v1/models")).json();
  server.models = models.data ?? [];
  await meetModel();
  await meetTools();
}
async function meetModel() {
  const query = server.models.length > 1 ? `?model=${encodeURIComponent(chosenModel())}` : "";
  server.props = await (await request(`/props${query}`)).json();
  drawServer();
  drawTools();
}
async function meetTools() {
  server.tools = [];
  try {
    server.tools = (await (await request("/page/tools")).json()).tools ?? [];
  } catch (error) {
    if (error.status !== 404) notice(`The list of tools: ${error.message}`);
  }
  drawTools();
}
function chosenModel() {
  const names = server.models.map(model => model.id);
  return names.includes(settings.model) ? settings.model : names[0];
}

// ---- settings: what is not set is left to the server, whose defaults stand in the empty boxes

const WHOLE = { inputMode: "numeric", step: 1 };
const PART = { inputMode: "decimal", step: "any" };
const FIELDS = [
  { name: "temperature", label: "Temperature", help: "0 takes the likeliest token", min: 0, max: 100, ...PART },
  { name: "top_p", label: "Top-p", help: "the likeliest tokens that hold this share", min: 0, max: 1, ...PART },
  { name: "top_k", label: "Top-k", help: "that many of the likeliest; 0 is all", min: 0, max: 2 ** 31, ...WHOLE },
  { name: "min_p", label: "Min-p", help: "at least this share of the likeliest", min: 0, max: 1, ...PART },
  { name: "max_tokens", label: "Most tokens", help: "of a reply", min: 1, max: 2 ** 31, ...WHOLE },
  { name: "seed", label: "Seed", help: "the same seed, the same reply", min: 0, max: Number.MAX_SAFE_INTEGER, ...WHOLE },
  { name: "thinking_budget", label: "Thinking budget", help: "tokens of thinking, then it has to answer", min: 0, max: 2 ** 31, ...WHOLE, thinks: true },
];
const settings = remembered.get("settings") ?? {};

function parameters() {
  const body = {}, thinks = server.props?.thinking;
  for (const field of FIELDS)
    if (settings[field.name] !== undefined && (!field.thinks || thinks !== "none")) body[field.name] = settings[field.name];
  if (thinks === "hybrid" && settings.thinking) body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return body;
}
function set(name, value) {
  if (value === undefined) delete settings[name];
  else settings[name] = value;
  remembered.set("settings", settings);
}
function drawSettings() {
  const defaults = server.props?.default_generation_settings?.params ?? {}, thinks = server.props?.thinking ?? "none";
  const shown = FIELDS.filter(field => !field.thinks || thinks !== "none").map(field => numberField(field, defaults[field.name]));
  if (thinks === "hybrid") shown.push(thinkingField());
  at("fields").replaceChildren(...shown);
  at("system").value = tree ? tree.conversation.system : settings.system ?? "";
}
function numberField({ name, label, help, thinks, ...limits }, usual) {
  const box = element("input", { type: "number", ...limits, value: settings[name] ?? "", placeholder: usual ?? (name === "seed" ? "random" : "no limit") });
  box.addEventListener("change", () => {
    if (box.validity.valid) set(name, box.value === "" ? undefined : Number(box.value));
    else box.reportValidity();
  });
  return element("label", { className: "field" }, label, box, element("small", {}, help));
}
function thinkingField() {
  const options = [["", "auto"], ["on", "on"], ["off", "off"]].map(([value, text]) => element("option", { value }, text));
  const box = element("select", {}, ...options);
  box.value = settings.thinking ?? "";
  box.addEventListener("change", () => set("thinking", box.value || undefined));
  return element("label", { className: "field" }, "Thinking", box, element("small", {}, "before the answer; off is faster"));
}
at("system").addEventListener("change", () => {
  set("system", at("system").value || undefined);
  if (!tree) return;
  tree.conversation.system = at("system").value;
  tree.save();
});
press("reset", () => {
  for (const name of [...FIELDS.map(field => field.name), "thinking"]) set(name, undefined);
  drawSettings();
});
press("open-settings", () => { drawer(false); drawSettings(); drawTools(); at("settings").showModal(); });

// ---- questions, in the page's own dialog: an answer is {choice, text}

function question({ title, text, input, choices, danger }) {
  const dialog = at("question"), box = at("question-input");
  at("question-title").textContent = title;
  at("question-text").textContent = text;
  box.hidden = !input;
  box.removeAttribute("aria-label");
  for (const [name, value] of Object.entries({ type: "text", value: "", ...input })) name.includes("-") ? box.setAttribute(name, value) : box[name] = value;
  at("question-choice").replaceChildren(...choices.map((choice, i) => {
    const last = i === choices.length - 1;
    return element("button", { type: last ? "submit" : "button", value: choice, className: last ? (danger ? "danger" : "primary") : "", onclick: last ? null : () => dialog.close(choice) }, choice);
  }));
  dialog.returnValue = "";
  dialog.showModal();
  if (input) box.select();
  return new Promise(resolve => dialog.addEventListener("close", () => {
    resolve({ choice: dialog.returnValue, text: box.value });
    box.value = "";
    toBox();
  }, { once: true }));
}
async function sure(title, text, choice) {
  return (await question({ title, text, choices: ["Cancel", choice], danger: true })).choice === choice;
}

// ---- replies

const ROUNDS = 10;           // of tool calls in one reply
const SAVE_EVERY = 400;      // ms: what a reload in the middle of a reply can lose
const running = new Map();   // id of a conversation -> what stops its reply
const progress = new Map();  // id of a message being written -> {stage, ...}

async function send(text, parent = tree?.conversation.leaf ?? null) {  // under `parent`: beside an earlier message it is a version of that
  const of = tree ?? await begin(text);
  if (running.has(of.conversation.id)) return;
  const asked = of.add({ role: "user", parent, content: text });
  await of.save(asked);
  await reply(of, asked);
}
async function reply(of, parent) {  // everything up to an answer without tool calls
  await conduct(of, async signal => {
    for (let round = 0; parent && !signal.aborted; round++) {
      const message = of.add({ role: "assistant", parent: parent.id, state: "writing", reasoning: "", calls: [] });
      await write(of, message, signal, { round });
      parent = message.state === "done" && message.calls.length && round < ROUNDS ? await useTools(of, message, signal) : null;
    }
  });
}
async function conduct(of, act) {
  const controller = new AbortController();
  running.set(of.conversation.id, controller);
  drawBusy();
  toBox();
  try {
    await act(controller.signal);
  } finally {
    running.delete(of.conversation.id);
    drawBusy();
    show(of);
  }
}
const stop = () => running.get(tree?.conversation.id)?.abort();

function prompt(of, message) {  // as the API has messages, up to `message`, or with what there is of it
  const path = of.path(message.content || message.reasoning ? message : of.messages.get(message.parent));
  const question = path.findLastIndex(one => one.role === "user");
  const sent = of.conversation.system ? [{ role: "system", content: of.conversation.system }] : [];
  path.forEach((one, i) => {
    if (one.role === "tool") return;  // they follow their calls below
    if (one.role === "assistant" && !one.content && !one.calls?.length && one !== message) return;  // it failed before a word
    sent.push({ role: one.role, content: one.content, ...i > question && one.reasoning && { reasoning_content: one.reasoning } });
    if (!one.calls?.length) return;
    sent.at(-1).tool_calls = one.calls.map(call => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
    for (const call of one.calls) sent.push({ role: "tool", tool_call_id: call.id, content: of.result(one, call)?.content ?? "This call was not made." });
  });
  return sent;
}
function bodyFor(of, message, round) {
  const begun = message.content || message.reasoning;
  return {
    model: chosenModel(), messages: prompt(of, message), stream: true, stream_options: { include_usage: true }, return_progress: true,
    ...parameters(), ...toolFields(round), ...begun && { continue_final_message: true, add_generation_prompt: false },
  };
}
async function write(of, message, signal, { round = 0, local = false } = {}) {
  progress.set(message.id, { stage: "sent" });
  show(of);
  of.save(message);  // so that a reload finds it, however early
  let saved = performance.now();
  try {
    if (!server.props) await meet();
    const response = await request("/v1/chat/completions", { body: bodyFor(of, message, round), signal, headers: local ? { "x-qwen3c-route": "local" } : {} });
    message.backend = response.headers.get("x-qwen3c-backend") ?? undefined;
    message.fallback = response.headers.get("x-qwen3c-fallback") ?? undefined;
    for await (const chunk of events(response)) {
      take(message, chunk);
      redraw(message);
      if (performance.now() - saved < SAVE_EVERY) continue;
      saved = performance.now();
      of.save(message);
    }
    if (!message.finish) throw new Failure("The connection ended before the reply did.", "cut");
    message.state = "done";
  } catch (error) {
    conclude(message, error);
  }
  endThinking(message);
  progress.delete(message.id);
  await of.save(message);
  show(of);
  say(message.trouble ? message.trouble.message : message.state === "stopped" ? "Stopped." : "The reply is complete.");
}
function take(message, chunk) {
  if (chunk.error) throw failureOf(chunk.error);
  const stage = progress.get(message.id);
  if (chunk.model) message.model = clean(chunk.model);
  if (chunk.prompt_progress) Object.assign(stage, chunk.prompt_progress);
  const { delta = {}, finish_reason } = chunk.choices?.[0] ?? {};
  if (delta.reasoning_content) {
    stage.stage = "thinking";
    stage.thinking ??= performance.now();
    message.reasoning += clean(delta.reasoning_content);
    message.seconds = (performance.now() - stage.thinking) / 1000;
  }
  if (delta.content) {
    endThinking(message);
    stage.stage = "writing";
    stage.first ??= performance.now();
    message.content += clean(delta.content);
  }
  for (const call of delta.tool_calls ?? []) takeCall(message, call, stage);
  if (finish_reason) message.finish = finish_reason;
  if (chunk.usage || chunk.timings) message.stats = statistics(chunk, stage);
}
function endThinking(message) {
  const stage = progress.get(message.id);
  if (stage?.stage === "thinking") message.seconds = (performance.now() - stage.thinking) / 1000;
}
function takeCall(message, call, stage) {
  endThinking(message);
  stage.stage = "calling";
  const place = call.index ?? message.calls.length;
  const known = message.calls[place] ??= { id: call.id || `call_${place}`, name: "", arguments: "" };
  known.name += clean(call.function?.name ?? "");
  known.arguments += call.function?.arguments ?? "";
}
function statistics({ usage, timings }, stage) {
  const made = usage?.completion_tokens ?? timings?.predicted_n ?? 0;
  const since = stage.thinking ?? stage.first;
  return {
    tokens: made, prompt: usage?.prompt_tokens ?? 0, cached: usage?.prompt_tokens_details?.cached_tokens ?? timings?.cache_n ?? 0,
    speed: timings?.predicted_per_second ?? (since && made > 1 ? 1000 * (made - 1) / (performance.now() - since) : 0),
  };
}
function conclude(message, error) {
  message.state = error.name === "AbortError" ? "stopped" : "failed";
  if (message.state === "stopped") return;
  const known = error instanceof Failure ? error : new Failure(`The connection broke: ${error.message}`, "cut");
  message.trouble = { message: known.message, code: known.code, again: known.again };
}

async function regenerate(message) {
  const of = tree;
  if (running.has(of.conversation.id)) return;
  const parent = of.messages.get(message.parent);
  if (message.trouble && !message.content && !message.reasoning) await of.remove(message);  // an attempt that came to nothing is no version
  await reply(of, parent);
}
async function goOn(message) {
  const of = tree, local = message.trouble?.again === "local";
  if (running.has(of.conversation.id)) return;
  Object.assign(message, { state: "writing", trouble: undefined, finish: undefined, calls: [], reasoning: message.reasoning ?? "" });
  await conduct(of, async signal => {
    await write(of, message, signal, { local });
    const parent = message.state === "done" && message.calls.length && await useTools(of, message, signal);
    if (parent) await reply(of, parent);
  });
}

// ---- tools of other servers: the model asks, the user allows, the page calls

const consents = new Map();  // a call that waits -> what takes "once", "always" or "deny"
const hasTools = () => {  // and the model, or the cloud in its place, can call them
  const able = server.models.find(model => model.id === chosenModel())?.capabilities;
  return server.tools.length > 0 && (!able || able.includes("tools") || Boolean(server.props?.upstream));
};
const usingTools = () => hasTools() && remembered.get("tools") === true;

function toolFields(round) {
  if (!usingTools()) return {};
  const tools = server.tools.map(tool => ({ type: "function", function: { name: tool.name, description: tool.description ?? "", parameters: tool.inputSchema } }));
  return round < ROUNDS ? { tools } : { tools, tool_choice: "none" };  // after the last round it has to answer
}
async function useTools(of, message, signal) {  // the message the next round goes on from; null if it was stopped
  let last = message;
  for (const call of message.calls) {
    const result = await useTool(of, message, call, signal);
    last = of.add({ role: "tool", parent: last.id, of: message.id, callId: call.id, name: call.name, ...result });
    await of.save(last);
    show(of);
  }
  return signal.aborted ? null : last;
}
async function useTool(of, message, call, signal) {
  const refused = content => ({ content, failed: true });
  let given;
  try { given = JSON.parse(call.arguments || "{}"); } catch { return refused("The arguments are not valid JSON; nothing was called."); }
  for (;;) {
    const tool = server.tools.find(one => one.name === call.name);
    if (!tool) return refused("There is no tool of this name.");
    if (of.conversation.allowed?.[tool.name] !== tool.digest) {
      const answer = await consent(of, message, call, signal);
      if (answer === "stop") return refused("The user stopped before this call was made.");
      if (answer === "deny") return { content: "The user did not allow this call.", denied: true, failed: true };
      if (answer === "always") of.conversation.allowed = { ...of.conversation.allowed, [tool.name]: tool.digest };
    }
    try {
      progress.set(message.id, { stage: "called" });
      show(of);
      const made = await (await request("/page/tools/call", { body: { name: tool.name, arguments: given, digest: tool.digest }, signal })).json();
      return { content: clean(String(made.content)), failed: Boolean(made.isError), cut: Boolean(made.truncated) };
    } catch (error) {
      if (error.status !== 409) return refused(error.name === "AbortError" ? "The user stopped this call." : `The call failed: ${error.message}`);
      await meetTools();  // its definition is another one now, so the consent is void
      notice(`The server changed what ${call.name} is. Look again before you allow it.`);
      if (of.conversation.allowed) delete of.conversation.allowed[call.name];
    } finally {
      progress.delete(message.id);
    }
  }
}
async function consent(of, message, call, signal) {
  const stopped = new Promise(resolve => signal.addEventListener("abort", () => resolve("stop"), { once: true }));
  const asked = new Promise(resolve => consents.set(call, resolve));
  show(of);
  say(`The model wants to call ${call.name}. Allow it or deny it.`);
  const answer = signal.aborted ? "stop" : await Promise.race([asked, stopped]);
  consents.delete(call);
  toBox();
  return answer;
}
function drawTools() {
  at("tools").hidden = !hasTools();
  at("tools").setAttribute("aria-pressed", usingTools());
  at("tools").textContent = `Tools · ${server.tools.length}`;
  at("tools-part").hidden = server.tools.length === 0;
  at("tools-list").replaceChildren(...server.tools.map(toolLine));
}
function toolLine(tool) {
  const always = tree?.conversation.allowed?.[tool.name] === tool.digest;
  const revoke = button("ask again", () => {
    delete tree.conversation.allowed[tool.name];
    tree.save();
    drawTools();
  }, { className: "plain" });
  return element("li", {}, element("code", {}, clean(tool.name)), always ? " always allowed in this chat " : "", always ? revoke : "", element("p", { className: "soft", tabIndex: 0 }, clean(tool.description ?? "")));
}
press("tools", () => { remembered.set("tools", !usingTools()); drawTools(); toBox(); });

// ---- messages on the page

const views = new WeakMap();  // message -> its view
const waiting = new Set();    // messages to draw in the next frame
let cost = 0, rested = 0;     // ms that the last frame took, and when it ended

function redraw(message) {
  if (waiting.size === 0) requestAnimationFrame(drawWaiting);
  waiting.add(message);
}
function drawWaiting() {
  if (performance.now() - rested < 3 * cost) return void requestAnimationFrame(drawWaiting);  // the page stays free for who uses it
  const start = performance.now();
  for (const message of waiting) views.get(message)?.draw();
  waiting.clear();
  void at("scroll").scrollHeight;  // the layout is part of the cost
  rested = performance.now();
  cost = rested - start;
}
function show(of) {  // the branch that is chosen, if it is that of the conversation on the page
  if (of !== tree) return;
  const shown = tree ? tree.path().filter(message => message.role !== "tool") : [];
  at("empty").hidden = shown.length > 0;
  const nodes = shown.map(message => {
    if (!views.has(message)) views.set(message, message.role === "user" ? new Asked(tree, message) : new Answer(tree, message));
    views.get(message).draw();
    return views.get(message).node;
  });
  const here = at("log").childNodes;
  if (nodes.length !== here.length || nodes.some((node, i) => node !== here[i])) at("log").replaceChildren(...nodes);
}
function versions(of, message) {  // ‹ 2 / 3 ›
  const all = of.versions(message), place = all.indexOf(message);
  if (all.length < 2) return null;
  const turn = (label, to, name) => button(label, () => {
    of.select(all[to]);
    of.save();
    show(of);
    toBox();
  }, { className: "plain", "aria-label": name, disabled: to < 0 || to >= all.length || running.has(of.conversation.id) });
  return element("span", { className: "versions" }, turn("‹", place - 1, "previous version"), `${place + 1} / ${all.length}`, turn("›", place + 1, "next version"));
}

class Asked {
  constructor(of, message) {
    Object.assign(this, { of, message });
    this.bubble = element("div", { className: "bubble" }, clean(message.content));
    this.foot = element("div", { className: "foot" });
    this.node = element("article", { className: "user" }, element("h2", { className: "unseen" }, "You"), this.bubble, this.foot);
  }
  draw() {
    const busy = running.has(this.of.conversation.id), state = `${busy} ${this.of.versions(this.message).length}`;
    if (state === this.drawn) return;
    this.drawn = state;
    const copier = button("copy", () => copy(this.message.content, copier), { className: "plain" });
    const edit = button("edit", () => this.edit(), { className: "plain", disabled: busy });
    this.foot.replaceChildren(...[versions(this.of, this.message), copier, edit].filter(Boolean));
  }
  edit() {
    const box = element("textarea", { value: this.message.content, rows: 3, "aria-label": "Edit your message" });
    const form = element("form", { className: "edit" }, box, element("div", { className: "choice" }, button("Cancel", () => close()), button("Send", () => done(), { className: "primary" })));
    const close = () => {
      form.replaceWith(this.bubble);
      this.foot.hidden = false;
      toBox();
    };
    const done = () => {
      close();
      if (box.value.trim()) send(box.value, this.message.parent);
    };
    box.addEventListener("keydown", event => {
      if (event.key === "Escape") close();
      else if (sends(event)) done();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    pinned = false;  // what is edited stays in sight instead of the end
    this.bubble.replaceWith(form);
    this.foot.hidden = true;
    box.focus();
  }
}

class Answer {
  constructor(of, message) {
    Object.assign(this, { of, message, prose: new Prose(), cards: [] });
    this.summary = element("summary");
    this.thought = document.createTextNode("");
    this.thinking = element("details", { className: "thinking", hidden: true }, this.summary, element("div", {}, this.thought));
    this.calls = element("div");
    this.trouble = element("div", { className: "trouble", hidden: true });
    this.foot = element("div", { className: "foot" });
    const late = message.state !== "writing";  // the others keep the size they grew to, or the log would jump when they end
    this.node = element("article", { className: late ? "assistant settled" : "assistant" }, element("h2", { className: "unseen" }, "Reply"), this.thinking, this.prose.node, this.calls, this.trouble, this.foot);
  }
  draw() {
    const { message } = this, writing = message.state === "writing";
    this.drawThinking();
    if (writing) this.prose.show(message.content);
    else this.prose.finish(message.content);
    for (const card of this.cards.splice(message.calls?.length ?? 0)) card.node.remove();
    message.calls?.forEach((call, i) => {
      if (this.cards[i]) return this.cards[i].draw();
      this.cards[i] = new Card(this.of, message, call);
      this.calls.append(this.cards[i].node);
    });
    this.node.classList.toggle("begun", Boolean(message.content || message.reasoning || this.cards.length || message.trouble && !writing));
    this.drawFoot(writing);
  }
  drawThinking() {
    const { reasoning, seconds: took } = this.message;
    this.thinking.hidden = !reasoning;
    if (!reasoning) return;
    const now = progress.get(this.message.id)?.stage === "thinking";
    this.summary.textContent = now ? `Thinking, ${seconds(took)}` : took === undefined ? "Thoughts" : `Thought for ${seconds(took)}`;
    if (reasoning.length !== this.thought.length) this.thought.appendData(reasoning.slice(this.thought.length));
  }
  drawFoot(writing) {
    const stage = progress.get(this.message.id), busy = running.has(this.of.conversation.id);
    const state = JSON.stringify([this.message.state, busy, this.of.versions(this.message).length, stage && [stage.stage, stage.position, stage.processed]]);
    if (state === this.drawn) return;
    this.drawn = state;
    this.foot.replaceChildren(...writing || stage ? stageOf(stage ?? {}) : [this.facts(), this.actions(busy)]);
    this.drawTrouble(writing, busy);
  }
  facts() {
    const { backend, fallback, model, stats, state, finish } = this.message, facts = [];
    if (backend) facts.push(element("span", { className: `badge ${fallback ? "fallback" : backend}` }, fallback ? `${backend}, because the cloud failed: ${clean(fallback)}` : clean(backend)));
    if (model) facts.push(model);
    if (stats?.speed) facts.push(`${stats.speed.toFixed(stats.speed < 9.95 ? 1 : 0)} tok/s`);
    if (stats?.tokens) facts.push(counted(stats.tokens, "token"));
    if (stats?.prompt) facts.push(`${stats.cached.toLocaleString("en")} of ${stats.prompt.toLocaleString("en")} cached`);
    if (state === "stopped") facts.push("stopped");
    if (finish === "length") facts.push("cut at the limit of tokens");
    return element("span", { className: "facts" }, ...facts.map(fact => fact instanceof Node ? fact : element("span", {}, fact)));
  }
  actions(busy) {
    const { message } = this, plain = { className: "plain", disabled: busy };
    const copier = button("copy", () => copy(message.content, copier), { className: "plain" });
    const more = (message.state === "stopped" || message.finish === "length") && (message.content || message.reasoning);
    const done = [versions(this.of, message), more && button("continue", () => goOn(message), plain), copier, button("regenerate", () => regenerate(message), plain)];
    return element("span", { className: "actions" }, ...done.filter(Boolean));
  }
  drawTrouble(writing, busy) {
    const { trouble, content, reasoning } = this.message, begun = content || reasoning;
    this.trouble.hidden = !trouble || writing;
    if (this.trouble.hidden) return;
    this.trouble.classList.toggle("mild", Boolean(begun));
    const again = begun ? button("continue here", () => goOn(this.message), { disabled: busy }) : button("retry", () => regenerate(this.message), { disabled: busy });
    this.trouble.replaceChildren(element("p", {}, trouble.message), again);
  }
}
function stageOf({ stage, position, processed, total }) {
  const share = total ? Math.floor(100 * processed / total) : 0;
  const words = {
    queued: `Queued, ${ordinal(position ?? 1)} in line`, reading: `Reading ${share} %`, thinking: "Thinking", writing: "Writing", calling: "Writing a call", called: "Waiting for the tool",
  }[stage] ?? "Waiting for the server";
  const bar = stage === "reading" ? element("progress", { max: 100, value: share, "aria-label": "prompt read" }) : null;
  return [element("span", { className: "pulse" }), element("span", {}, words), bar].filter(Boolean);
}

class Card {  // a call of a tool: what, with what, whether it may, what came
  constructor(of, message, call) {
    Object.assign(this, { of, message, call });
    this.node = element("div", { className: "tool", role: "group", "aria-label": `Call of ${call.name}` });
    this.draw();
  }
  draw() {
    const result = this.of.result(this.message, this.call), asks = consents.has(this.call);
    const state = [this.call.arguments.length, asks, result?.id, progress.has(this.message.id)].join();
    if (state === this.drawn) return;
    this.drawn = state;
    this.node.classList.toggle("asks", asks);
    const outcome = result ? (result.denied ? "not allowed" : result.failed ? "failed" : "done") : asks ? "asks to be called" : progress.has(this.message.id) ? "…" : "not called";
    const given = element("pre", { tabIndex: 0, role: "group", "aria-label": "Arguments" }, pretty(this.call.arguments));
    this.node.replaceChildren(...[
      element("p", { className: "what" }, element("code", {}, this.call.name), element("span", { className: "soft" }, outcome)),
      asks ? given : element("details", {}, element("summary", {}, "Arguments"), given), asks ? this.described() : null, asks ? this.choice() : null, result ? resultOf(result) : null,
    ].filter(Boolean));
  }
  described() {
    const tool = server.tools.find(one => one.name === this.call.name);
    return tool?.description ? element("details", {}, element("summary", {}, "What its server says of it"), element("p", { className: "raw" }, clean(tool.description))) : null;
  }
  choice() {
    const answer = (label, value, className = "") => button(label, () => consents.get(this.call)?.(value), { className });
    return element("div", { className: "choice" }, answer("Allow once", "once", "primary"), answer("Always for this tool here", "always"), answer("Deny", "deny"));
  }
}
function pretty(json) {
  try { return clean(JSON.stringify(JSON.parse(json), null, 2)); } catch { return clean(json); }
}
function resultOf(result) {
  const note = result.cut ? element("p", { className: "soft" }, "The result was longer; its end was cut off.") : null;
  return element("details", {}, element("summary", {}, `Result, ${counted(result.content.length, "character")}${result.cut ? ", cut" : ""}`),
    element("pre", { tabIndex: 0, role: "group", "aria-label": "Result" }, result.content), note);
}

// ---- the end of the log stays in sight, unless one scrolled away from it

let pinned = true, moved = -Infinity;  // moved: when a hand last did what may scroll; a log that changes its height scrolls too
for (const kind of ["wheel", "touchmove", "keydown", "pointerdown"]) at("scroll").addEventListener(kind, () => { moved = performance.now(); }, { passive: true });
function toEnd() {
  pinned = true;
  at("newest").hidden = true;
  at("scroll").scrollTop = at("scroll").scrollHeight;
}
at("scroll").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = at("scroll");
  if (scrollHeight - scrollTop - clientHeight < 40) pinned = true;
  else if (performance.now() - moved < 1000) pinned = false;
  at("newest").hidden = pinned;
}, { passive: true });
new ResizeObserver(() => { if (pinned) toEnd(); }).observe(at("log"));
press("newest", () => { toEnd(); toBox(); });

// ---- conversations

let tree = null;           // of the conversation on the page; null: a new one that nothing was said in
let conversations = [];
const trees = new Map();   // those with a reply being written, and the one on the page
let unfolded = null;       // the conversation whose actions are shown
let found = null;          // id -> where the search found its words; null: nothing is searched for

async function begin(text) {
  const title = clean(text).trim().split("\n")[0].slice(0, 80) || "Chat";
  const conversation = { id: newId(), title, created: moment(), updated: Date.now(), system: settings.system ?? "", leaf: null };
  conversations.push(conversation);
  tree = new Tree(conversation);
  trees.set(conversation.id, tree);
  history.pushState(null, "", `#${conversation.id}`);
  await keep({ conversations: [conversation] });
  drawTitle();
  drawList();
  return tree;
}
async function open(id) {
  const conversation = conversations.find(one => one.id === id);
  for (const other of trees.keys()) if (!running.has(other)) trees.delete(other);
  if (conversation && !trees.has(id)) trees.set(id, await load(conversation));
  tree = conversation ? trees.get(id) : null;
  if (location.hash.slice(1) !== (tree ? id : "")) history.pushState(null, "", tree ? `#${id}` : location.pathname);
  show(tree);
  drawTitle();
  drawList();
  drawBusy();
  toEnd();
  toBox();
}
async function load(conversation) {
  const messages = await store.all("messages", conversation.id);
  for (const message of messages)
    if (message.state === "writing") Object.assign(message, { state: "failed", trouble: { message: "The page was closed before the reply ended. What had come is kept.", code: "reloaded", again: "retry" } });
  return new Tree(conversation, messages);
}
async function changed() {  // by another tab
  const kept = record => trees.has(record.id) ? Object.assign(trees.get(record.id).conversation, { title: record.title }) : record;
  conversations = (await store.all("conversations")).map(kept);
  if (tree && !conversations.includes(tree.conversation) && !running.has(tree.conversation.id)) return open(null);
  drawList();
}
function drawTitle() {
  const title = tree?.conversation.title ?? "New chat";
  at("title").textContent = title;
  document.title = tree ? `${title} · qwen3c` : "qwen3c";
}
function drawBusy() {
  const busy = Boolean(tree && running.has(tree.conversation.id));
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  at("log").setAttribute("aria-busy", busy);  // the log is read out when a reply is whole, not word by word
  drawList();
}
function drawList() {
  const shown = conversations.filter(one => !found || found.has(one.id)).sort((a, b) => b.updated - a.updated);
  const lines = [];
  let group = "";
  for (const conversation of shown) {
    const day = dayOf(conversation.updated);
    if (day !== group) lines.push(element("li", { className: "group" }, group = day));
    lines.push(conversationLine(conversation));
  }
  if (!shown.length) lines.push(element("li", { className: "group" }, found ? "Nothing found" : "Nothing said yet"));
  at("list").replaceChildren(...lines);
}
function dayOf(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 864e5);
  return days < 1 ? "Today" : days < 2 ? "Yesterday" : days < 7 ? "This week" : "Earlier";
}
function conversationLine(conversation) {
  const { id, title } = conversation, current = id === tree?.conversation.id;
  const name = element("span", { className: running.has(id) ? "name busy" : "name" }, title);
  const opener = button(name, () => { drawer(false); open(id); }, { className: "open" });
  if (current) opener.setAttribute("aria-current", "true");
  if (found?.get(id)) opener.append(element("span", { className: "found" }, ...found.get(id)));
  const more = button("⋯", () => {
    unfolded = unfolded === id ? null : id;
    drawList();
    at("list").querySelector(`.more[data-of="${id}"]`)?.focus();
  }, { className: "more", "aria-label": `More for ${title}`, "aria-expanded": unfolded === id, "data-of": id });
  const row = element("div", { className: current ? "row current" : "row" }, opener, more);
  return element("li", {}, row, unfolded === id ? actionsOf(conversation) : null);
}
function actionsOf(conversation) {
  const plain = { className: "plain" };
  return element("div", { className: "actions" },
    button("rename", () => rename(conversation), plain), button("export", () => exportThem([conversation]), plain), button("delete", () => removeThem([conversation]), { className: "plain danger" }));
}
async function rename(conversation) {
  const answer = await question({ title: "Rename", text: "", input: { value: conversation.title, "aria-label": "Title" }, choices: ["Cancel", "Rename"] });
  if (answer.choice !== "Rename" || !answer.text.trim()) return;
  conversation.title = clean(answer.text).trim();
  await keep({ conversations: [conversation] });
  drawTitle();
  drawList();
}
async function removeThem(list) {
  const what = list.length === 1 ? `“${list[0].title}”` : `all ${counted(list.length, "conversation")}`;
  if (!list.length || !await sure("Delete", `Delete ${what}? This cannot be undone.`, "Delete")) return;
  for (const { id } of list) running.get(id)?.abort();
  conversations = conversations.filter(one => !list.includes(one));
  await store.remove(list.map(conversation => conversation.id));
  if (tree && list.includes(tree.conversation)) await open(null);
  drawList();
}

let searching = 0;
at("search").addEventListener("input", () => {
  clearTimeout(searching);
  searching = setTimeout(search, 150);
});
async function search() {
  const words = at("search").value.trim().toLowerCase();
  const places = new Map();
  if (words) {
    for (const { id, title } of conversations) if (title.toLowerCase().includes(words)) places.set(id, null);
    for (const { conversation, content } of await store.all("messages")) {
      const start = content.toLowerCase().indexOf(words);
      if (start < 0 || places.has(conversation)) continue;
      const part = (from, to) => clean(content.slice(Math.max(0, from), to));
      places.set(conversation, [part(start - 18, start), element("mark", {}, part(start, start + words.length)), part(start + words.length, start + 80)]);
    }
  }
  found = words ? places : null;
  drawList();
}

// ---- conversations as a file

const FORMAT = "qwen3c-conversations";
const LARGEST = 256 << 20;  // bytes of a file
const isText = value => typeof value === "string";
const isNumber = value => typeof value === "number" && Number.isFinite(value);
const isFlag = value => typeof value === "boolean";
const among = (...values) => value => values.includes(value);
const maybe = check => Object.assign(value => value === undefined || check(value), { optional: true });
const each = shape => value => Array.isArray(value) && value.every(item => record(item, shape));
const record = (value, shape) => value !== null && typeof value === "object" && Object.entries(shape).every(([name, check]) => check(value[name]));
const CALL = { id: isText, name: isText, arguments: isText };
const STATS = { tokens: isNumber, prompt: isNumber, cached: isNumber, speed: isNumber };
const TROUBLE = { message: isText, code: isText, again: among("retry", "local") };
const MESSAGE = {
  id: isText, parent: value => value === null || isText(value), role: among("user", "assistant", "tool"), content: isText, created: isNumber,
  state: among("done", "stopped", "failed", "writing"), reasoning: maybe(isText), seconds: maybe(isNumber), finish: maybe(isText), calls: maybe(each(CALL)),
  of: maybe(isText), callId: maybe(isText), name: maybe(isText), failed: maybe(isFlag), cut: maybe(isFlag), denied: maybe(isFlag),
  model: maybe(isText), backend: maybe(isText), fallback: maybe(isText), stats: maybe(value => record(value, STATS)), trouble: maybe(value => record(value, TROUBLE)),
};
const CONVERSATION = { title: isText, created: isNumber, updated: isNumber, system: isText, leaf: value => value === null || isText(value) };  // no consent to tools: a file must not give it

function picked(value, shape, where) {  // the known fields, or an error that names the one that is wrong
  if (value === null || typeof value !== "object") throw new Error(`${where} is no object`);
  const kept = {};
  for (const [name, check] of Object.entries(shape)) {
    if (!check(value[name])) throw new Error(`${where}.${name} is ${value[name] === undefined ? "missing" : "not what it should be"}`);
    if (value[name] !== undefined) kept[name] = value[name];
  }
  return kept;
}
async function exportThem(list) {
  const written = await Promise.all(list.map(async conversation => ({
    ...picked(conversation, CONVERSATION, "conversation"),
    messages: (await store.all("messages", conversation.id)).sort((a, b) => a.created - b.created).map(message => picked(message, MESSAGE, "message")),
  })));
  const file = new Blob([JSON.stringify({ format: FORMAT, version: 1, conversations: written }, null, 1)], { type: "application/json" });
  const address = URL.createObjectURL(file);
  element("a", { href: address, download: `${list.length === 1 ? "conversation" : "conversations"}-${new Date().toISOString().slice(0, 10)}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
function imported(text) {  // records with new ids, so that nothing that is there is written over
  let data;
  try { data = JSON.parse(text); } catch { throw new Error("it is not JSON"); }
  if (data?.format !== FORMAT || data.version !== 1 || !Array.isArray(data.conversations)) throw new Error(`it is no export of this page (format "${FORMAT}", version 1)`);
  const records = { conversations: [], messages: [] };
  data.conversations.forEach((one, i) => {
    const conversation = { ...picked(one, CONVERSATION, `conversations[${i}]`), id: newId() };
    if (!Array.isArray(one.messages)) throw new Error(`conversations[${i}].messages is missing`);
    const ids = new Map([[null, null]]);
    one.messages.forEach((given, k) => {
      const where = `conversations[${i}].messages[${k}]`, message = picked(given, MESSAGE, where);
      for (const name of ["parent", "of"]) if (message[name] !== undefined && !ids.has(message[name])) throw new Error(`${where}.${name} names no message before it`);
      if (ids.has(message.id)) throw new Error(`${where}.id comes twice`);
      ids.set(message.id, newId());
      if (message.role !== "user") message.content = clean(message.content);
      records.messages.push({ ...message, id: ids.get(message.id), parent: ids.get(message.parent), ...message.of && { of: ids.get(message.of) }, conversation: conversation.id });
    });
    if (!ids.has(conversation.leaf)) throw new Error(`conversations[${i}].leaf names no message`);
    records.conversations.push({ ...conversation, title: clean(conversation.title), leaf: ids.get(conversation.leaf) });
  });
  return records;
}
async function importFile(file) {
  try {
    if (file.size > LARGEST) throw new Error(`it has ${file.size >> 20} MiB, at most ${LARGEST >> 20} are read`);
    const records = imported(await file.text());
    await store.put(records);
    conversations.push(...records.conversations);
    notice(`${counted(records.conversations.length, "conversation")} imported.`);
    drawList();
  } catch (error) {
    notice(`${clean(file.name)} was not imported: ${error.message}. Nothing was changed.`);
  }
  at("settings").close();
}
press("export-all", () => exportThem(conversations));
press("import", () => at("file").click());
at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  at("file").value = "";
  if (file) importFile(file);
});
press("delete-all", () => { at("settings").close(); removeThem([...conversations]); });

// ---- around the conversation: server, theme, drawer, keys

const IDEAS = ["Explain how a radix tree works", "Write a Python function that parses ISO dates", "Compare TCP and UDP in a table", "Help me word a polite reminder"];
function drawServer() {
  const { props, models } = server, name = chosenModel() ?? props?.model_alias ?? "";
  const upstream = props?.upstream;
  at("model").hidden = models.length < 2;
  at("model").replaceChildren(...models.map(model => element("option", { value: model.id }, clean(model.id))));
  at("model").value = name;
  const context = props?.n_ctx ? `${props.n_ctx.toLocaleString("en")} tokens of context` : "";
  at("about").textContent = [models.length < 2 ? clean(name) : "", upstream ? "cloud first" : ""].filter(Boolean).join(" · ");
  at("name").textContent = clean(name) || "qwen3c";
  at("promise").textContent = [context, upstream ? `${clean(upstream.model)} in the cloud answers first (${clean(String(upstream.state))})` : "runs on this server alone", "chats stay in this browser"].filter(Boolean).join(" · ");
}
at("model").addEventListener("change", async () => {
  set("model", at("model").value);
  await meetModel().catch(error => notice(error.message));
  toBox();
});
at("ideas").append(...IDEAS.map(idea => button(idea, () => {
  at("box").value = idea;
  toBox();
})));

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
}
press("theme", () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const next = (document.documentElement.dataset.theme ?? system) === "dark" ? "light" : "dark";
  remembered.set("theme", next === system ? null : next);  // as the system has it: follow the system again
  theme(remembered.get("theme"));
});
function drawer(shown) {
  if (document.body.classList.contains("drawer") === shown) return;
  document.body.classList.toggle("drawer", shown);
  at("main").inert = shown;
  at("open-drawer").setAttribute("aria-expanded", shown);
  (shown ? at("new") : at("open-drawer")).focus();
}
press("open-drawer", () => drawer(true));
for (const id of ["close-drawer", "shade"]) at(id).addEventListener("click", () => drawer(false));

function newChat() {
  drawer(false);
  return open(null);
}
const sends = event => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;  // Enter may end a word that is being composed
function submit() {
  const text = at("box").value;
  if (!text.trim() || tree && running.has(tree.conversation.id)) return;
  at("box").value = "";
  at("box").focus();
  toEnd();
  send(text);
}
press("new", newChat);
press("stop", () => { stop(); toBox(); });
press("notice-close", () => { notice(""); toBox(); });
at("composer").addEventListener("submit", event => { event.preventDefault(); submit(); });
at("box").addEventListener("keydown", event => {
  if (!sends(event)) return;
  event.preventDefault();
  submit();
});
addEventListener("keydown", event => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") document.body.classList.contains("drawer") ? drawer(false) : stop();
  else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") newChat();
  else return;
  event.preventDefault();
});
addEventListener("popstate", () => open(location.hash.slice(1)));
addEventListener("pagehide", () => {
  for (const [id] of running) trees.get(id)?.save(...trees.get(id).path().filter(message => message.state === "writing"));
});
tabs.addEventListener("message", changed);

async function start() {
  theme(remembered.get("theme"));
  try {
    await store.open();
  } catch {
    notice("This browser keeps nothing for this page: conversations end with the tab.");
  }
  conversations = await store.all("conversations");
  await open(location.hash.slice(1));
  performance.mark("shown");
  await meet().catch(error => notice(error.message));
}
start();
