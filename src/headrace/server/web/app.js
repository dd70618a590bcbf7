// The page: conversations in the browser's own storage, one open at a time, answers as they stream.
import { models, promptTokens, stream } from "/web/api.js";
import { copy } from "/web/clipboard.js";
import { element, markdown } from "/web/markdown.js";
import { STRINGS } from "/web/strings.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["temperature", "top_k", "top_p", "seed", "max_tokens"];
const STORE = "headrace";

const state = load();
let served = [];
let abort = null; // of the answer under way

function load() {
  const fresh = { conversations: [], current: null, model: null, settings: {}, language: navigator.language.startsWith("zh") ? "zh" : "en", theme: "" };
  try {
    return { ...fresh, ...JSON.parse(localStorage.getItem(STORE) ?? "{}") };
  } catch {
    return fresh;
  }
}

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    // The storage is full: the oldest conversation goes, but never the one that is open.
    const oldest = state.conversations.findLastIndex((c) => c.id !== state.current);
    if (oldest >= 0) {
      state.conversations.splice(oldest, 1);
      save();
    }
  }
}

const strings = () => STRINGS[state.language];
const current = () => state.conversations.find((c) => c.id === state.current);

function newConversation() {
  const empty = state.conversations.find((c) => !c.messages.length);
  const made = empty ?? { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", messages: [], used: 0 };
  if (!empty) state.conversations.unshift(made);
  open(made.id);
}

function open(id) {
  abort?.abort();
  state.current = id;
  document.body.classList.remove("menu-open");
  $("menu").setAttribute("aria-expanded", "false");
  save();
  render();
  $("input").focus();
}

function remove(id) {
  if (!confirm(strings().remove_confirm)) return;
  state.conversations = state.conversations.filter((c) => c.id !== id);
  if (state.current === id) state.conversations.length ? open(state.conversations[0].id) : newConversation();
  save();
  renderList();
}

// What is shown

function render() {
  document.documentElement.lang = state.language === "zh" ? "zh-Hans" : "en";
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  else delete document.documentElement.dataset.theme;
  for (const node of document.querySelectorAll("[data-i18n]")) node.textContent = strings()[node.dataset.i18n];
  for (const node of document.querySelectorAll("[data-i18n-placeholder]")) node.placeholder = strings()[node.dataset.i18nPlaceholder];
  for (const node of document.querySelectorAll("[data-i18n-label]")) node.setAttribute("aria-label", strings()[node.dataset.i18nLabel]);
  $("language").textContent = state.language === "zh" ? "English" : "中文";
  renderList();
  renderLog();
  renderGauge();
}

function renderList() {
  $("conversations").replaceChildren(...state.conversations.map((c) => {
    const open_ = element("button", { className: "open", type: "button", textContent: c.title || strings().untitled });
    open_.addEventListener("click", () => open(c.id));
    const remove_ = element("button", { className: "remove", type: "button", textContent: "×" });
    remove_.setAttribute("aria-label", strings().remove);
    remove_.addEventListener("click", () => remove(c.id));
    const row = element("div", { className: "row" }, open_, remove_);
    row.setAttribute("aria-current", String(c.id === state.current));
    return row;
  }));
}

function renderLog() {
  const conversation = current();
  if (!conversation.messages.length) {
    const examples = strings().examples.map((text) => {
      const button = element("button", { type: "button", textContent: text });
      button.addEventListener("click", () => say(text));
      return button;
    });
    $("log").replaceChildren(element("div", { className: "welcome" },
      element("h1", { textContent: strings().welcome }), element("div", { className: "examples" }, ...examples)));
    return;
  }
  $("log").replaceChildren(...conversation.messages.map(messageNode));
  $("log").scrollTop = $("log").scrollHeight;
}

function messageNode(message, index) {
  const body = element("div", { className: "body" });
  fill(body, message);
  const actions = element("div", { className: "actions" });
  const action = (label, run) => {
    const button = element("button", { type: "button", textContent: label });
    button.addEventListener("click", () => run(button));
    actions.append(button);
  };
  action(strings().copy, (button) => copy(message.content, button, strings()));
  if (message.role === "user") action(strings().edit, () => edit(index));
  else action(strings().regenerate, () => regenerate(index));
  if (message.stats) actions.append(element("span", { className: "stats", textContent: statsText(message) }));
  return element("article", { className: `message ${message.role}` }, body, actions);
}

function fill(body, message) {
  if (message.role === "user") body.textContent = message.content;
  else if (message.error) body.replaceChildren(...markdown(message.content, strings()), element("p", { className: "error", textContent: message.error }));
  else if (state.settings.show_probabilities && message.tokens?.length) body.replaceChildren(...tokenNodes(message.tokens));
  else body.replaceChildren(...markdown(message.content, strings()));
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

/** A character of several tokens stands where its last one is. */
function tokenNodes(tokens) {
  const decoder = new TextDecoder();
  return tokens.map((token) => tokenNode(token, decoder.decode(new Uint8Array(token.bytes ?? []), { stream: true })));
}

function tokenNode(token, text) {
  const p = Math.exp(token.logprob);
  const level = p > 0.9 ? 0 : p > 0.6 ? 1 : p > 0.3 ? 2 : p > 0.1 ? 3 : 4;
  const others = (token.top_logprobs ?? []).map((t) => `${JSON.stringify(t.token)}  ${percent(t.logprob)}`).join("\n");
  return element("span", { className: `token p${level}`, textContent: text, title: `${percent(token.logprob)}\n${others}` });
}

function statsText({ stats, finish }) {
  const parts = [`${strings().first} ${stats.first.toFixed(2)} s`, `${stats.speed.toFixed(1)} tok/s`, `${stats.tokens} ${strings().tokens}`];
  if (stats.cached) parts.push(`${stats.cached} ${strings().cached}`);
  if (!finish) parts.push(strings().stopped);
  if (finish === "length") parts.push(current().used >= contextLength() ? strings().context_full : strings().cut);
  return parts.join(" · ");
}

const contextLength = () => served.find((m) => m.id === $("model").value)?.context_length ?? 0;

function renderGauge() {
  const total = contextLength();
  const used = current()?.used ?? 0;
  const share = total ? Math.min(1, used / total) : 0;
  $("gauge").querySelector("i").style.width = `${100 * share}%`;
  $("gauge").querySelector("span").textContent = total ? `${used} / ${total}` : "";
  $("gauge").classList.toggle("full", share > 0.9);
  $("gauge").setAttribute("aria-valuenow", used);
  $("gauge").setAttribute("aria-valuemax", total);
  $("gauge").title = strings().context;
}

// What is said

function say(text) {
  if (!text.trim() || abort) return;
  const conversation = current();
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= text.trim().slice(0, 60);
  answer(conversation);
}

function edit(index) {
  if (abort) return;
  const conversation = current();
  $("input").value = conversation.messages[index].content;
  conversation.messages.length = index;
  save();
  render();
  resize();
  $("input").focus();
  measure(conversation);
}

/** How much of the context a conversation takes whose last answer did not come to tell: it was stopped or taken back. */
async function measure(conversation) {
  const { model, messages } = requestBody(conversation);
  try {
    conversation.used = conversation.messages.length ? await promptTokens({ model, messages }, state.settings.api_key) : 0;
  } catch {
    return; // the gauge stays as it was
  }
  save();
  renderGauge();
}

function regenerate(index) {
  if (abort) return;
  const conversation = current();
  conversation.messages.length = index;
  answer(conversation);
}

function requestBody(conversation) {
  const body = { model: $("model").value, messages: [] };
  if (state.settings.system) body.messages.push({ role: "system", content: state.settings.system });
  for (const { role, content } of conversation.messages) body.messages.push({ role, content });
  for (const field of FIELDS) if (state.settings[field] !== undefined) body[field] = state.settings[field];
  if (state.settings.show_probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return body;
}

async function answer(conversation) {
  const body = requestBody(conversation);
  const message = { role: "assistant", content: "", tokens: [] };
  conversation.messages.push(message);
  abort = new AbortController();
  busy(true);
  save();
  render();
  const node = $("log").lastElementChild.querySelector(".body");
  node.classList.add("cursor");
  const started = performance.now();
  let first = 0;
  let count = 0;
  let drawn = 0;
  let told = false; // what the conversation takes of the context
  const draw = () => {
    const near = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
    fill(node, message);
    if (near) $("log").scrollTop = $("log").scrollHeight;
    drawn = performance.now();
  };
  try {
    for await (const piece of stream(body, state.settings.api_key, abort.signal)) {
      const now = performance.now();
      if (piece.text || piece.tokens.length) {
        first ||= now;
        count += 1;
        message.content += piece.text;
        message.tokens.push(...piece.tokens);
        if (now - drawn > 33) draw();
        const speed = count > 1 ? ((count - 1) * 1000) / (now - first) : 0;
        $("status").textContent = `${strings().first} ${((first - started) / 1000).toFixed(2)} s · ${speed.toFixed(1)} tok/s`;
      }
      message.finish = piece.finish ?? message.finish;
      if (piece.usage) {
        conversation.used = piece.usage.total_tokens;
        told = true;
        count = piece.usage.completion_tokens;
        message.stats = { cached: piece.usage.prompt_tokens_details?.cached_tokens ?? 0 };
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") message.error = error.message;
  }
  const seconds = Math.max(1e-3, (performance.now() - first) / 1000);
  if (first) message.stats = { cached: 0, ...message.stats, first: (first - started) / 1000, speed: Math.max(0, count - 1) / seconds, tokens: count };
  else delete message.stats;
  if (!message.tokens.length) delete message.tokens;
  abort = null;
  busy(false);
  save();
  render();
  if (!told) measure(conversation);
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (!yes) $("status").textContent = "";
}

function resize() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

// What the person does

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (abort) return;
  const text = $("input").value;
  $("input").value = "";
  resize();
  say(text);
});
$("input").addEventListener("input", resize);
$("input").addEventListener("keydown", (event) => {
  // A Chinese input method uses Enter to choose a word: then it does not send.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") abort ? abort.abort() : document.body.classList.remove("menu-open");
  if ((event.ctrlKey || event.metaKey) && event.key === "k") {
    event.preventDefault();
    newConversation();
  }
});
$("stop").addEventListener("click", () => abort?.abort());
addEventListener("beforeunload", () => abort?.abort()); // or the answer would end with the network's error
addEventListener("pagehide", () => abort && save()); // what came so far
addEventListener("storage", (event) => {
  // Another tab of this page has saved. What this one saves next must not take that away.
  if (event.key !== STORE || abort) return;
  const here = state.current;
  Object.assign(state, load());
  if (state.conversations.some((c) => c.id === here)) state.current = here;
  render();
});
$("new").addEventListener("click", newConversation);
$("menu").addEventListener("click", () => {
  const shown = document.body.classList.toggle("menu-open");
  $("menu").setAttribute("aria-expanded", String(shown));
});
document.querySelector("main").addEventListener("click", (event) => {
  if (event.target.closest("#menu")) return;
  document.body.classList.remove("menu-open");
});
$("settings-toggle").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("settings-toggle").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("language").addEventListener("click", () => {
  state.language = state.language === "zh" ? "en" : "zh";
  save();
  render();
});
$("theme").addEventListener("click", () => {
  state.theme = { "": "dark", dark: "light", light: "" }[state.theme];
  save();
  render();
});
$("model").addEventListener("change", () => {
  state.model = $("model").value;
  save();
  renderGauge();
});
for (const id of [...FIELDS, "system", "api_key", "show_probabilities"]) {
  const input = $(id);
  const value = state.settings[id];
  if (input.type === "checkbox") input.checked = Boolean(value);
  else if (value !== undefined) input.value = value;
  input.addEventListener("change", () => {
    const given = input.type === "checkbox" ? input.checked : input.type === "number" ? (input.value === "" ? undefined : Number(input.value)) : input.value || undefined;
    state.settings[id] = given;
    save();
    if (id === "api_key") connect();
    if (id === "show_probabilities" && !abort) renderLog();
  });
}

async function connect() {
  try {
    served = await models(state.settings.api_key);
    $("model").replaceChildren(...served.map((m) => element("option", { value: m.id, textContent: m.id })));
    if (served.some((m) => m.id === state.model)) $("model").value = state.model;
    $("status").textContent = "";
    renderGauge();
  } catch (error) {
    $("status").textContent = error.message;
    $("settings").hidden = false;
  }
}

if (!current()) newConversation();
else render();
connect();
