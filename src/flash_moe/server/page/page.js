// The chat. What a model writes is only ever set as text: nothing of it becomes markup.
import { modelName, watchExperts } from "./experts.js";

const $ = (id) => document.getElementById(id);
let history = [];
let running = null;

function element(parent, tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

export function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// Yields the JSON values of a server-sent event stream.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// Shows text, with fenced code in boxes.
function show(node, text) {
  node.replaceChildren();
  text.split(/^```[^\n]*\n?/m).forEach((part, i) => {
    if (i % 2) element(node, "pre", "", part.replace(/\n$/, ""));
    else if (part) node.append(part);
  });
}

function atEnd() {
  const box = $("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function request() {
  const system = $("system").value.trim();
  const body = { model: modelName(), messages: [...(system ? [{ role: "system", content: system }] : []), ...history], stream: true };
  body.stream_options = { include_usage: true };
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  body.max_tokens = Number($("max-tokens").value || 512);
  if ($("thinking").value) body.enable_thinking = $("thinking").value === "true";
  if ($("tools").value.trim()) body.tools = JSON.parse($("tools").value);
  return body;
}

async function failure(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function merge(calls, pieces) {
  for (const piece of pieces) {
    const call = (calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    if (piece.id) call.id = piece.id;
    call.function.name += piece.function?.name ?? "";
    call.function.arguments += piece.function?.arguments ?? "";
  }
}

// A call, with a field in which a person plays the tool.
function showCall(node, call, answered) {
  const box = element(node, "div", "call");
  element(box, "code", "", `${call.function.name}(${call.function.arguments})`);
  const form = element(box, "form");
  const input = element(form, "input");
  input.setAttribute("aria-label", `Result of ${call.function.name}`);
  input.placeholder = "result of the call";
  element(form, "button", "", "Send result").type = "submit";
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.replaceWith(Object.assign(document.createElement("div"), { className: "note", textContent: `→ ${input.value}` }));
    answered({ role: "tool", tool_call_id: call.id, content: input.value });
  });
  return input;
}

class ReplyView {
  constructor() {
    this.node = element($("messages"), "article", "reply");
    this.text = this.reasoning = "";
    this.calls = [];
  }

  add(delta) {
    const follow = atEnd();
    const thought = delta.reasoning_content;
    if (thought) {
      if (!this.folded) {
        this.folded = element(this.node, "details", "reasoning");
        element(this.folded, "summary", "", "Reasoning");
        this.thoughts = element(this.folded, "div");
      }
      this.thoughts.textContent = this.reasoning += thought;
    }
    if (delta.content) {
      this.body ??= element(this.node, "div", "text");
      show(this.body, (this.text += delta.content));
    }
    merge(this.calls, delta.tool_calls ?? []);
    if (follow) $("messages").scrollTop = $("messages").scrollHeight;
  }

  message() {
    const message = { role: "assistant", content: this.text };
    if (this.reasoning) message.reasoning_content = this.reasoning;
    if (this.calls.length) message.tool_calls = this.calls;
    return message;
  }

  note(text, className = "note") {
    element(this.node, "div", className, text);
  }
}

async function reply() {
  const view = new ReplyView();
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  let reason = null;
  let usage = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      view.add(choice.delta);
      reason = choice.finish_reason ?? reason;
    }
    if (reason === "length") view.note("The reply was cut at the token limit.");
    if (usage) view.note(`${usage.prompt_tokens} prompt tokens, ${usage.completion_tokens} generated`);
  } catch (error) {
    if (error.name === "AbortError") view.note("Stopped.");
    else view.note(error.message, "note error");
  } finally {
    running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    if (view.text || view.calls.length) history.push(view.message());
  }
  let open = reason === "tool_calls" ? view.calls.length : 0;
  const inputs = view.calls.slice(0, open).map((call) => showCall(view.node, call, (result) => {
    history.push(result);
    if (--open === 0) reply();
  }));
  (inputs[0] ?? $("input")).focus();
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  try {
    if ($("tools").value.trim()) JSON.parse($("tools").value);
  } catch (error) {
    element($("messages"), "div", "note error", `Tools are not JSON: ${error.message}`);
    return;
  }
  $("input").value = "";
  history.push({ role: "user", content: text });
  element($("messages"), "div", "user", text);
  $("messages").scrollTop = $("messages").scrollHeight;
  reply();
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  history = [];
  $("messages").replaceChildren();
  $("input").focus();
});

watchExperts(headers, events);
