// Draws which experts are read, and from where, as the server reports it.
const $ = (id) => document.getElementById(id);
const FADE = 1500; // milliseconds until a cell has faded
const WINDOW = 60; // seconds of the hit-rate curve
let shape = null; // { model, layers, experts }
let cells = new Map(); // layer * experts + expert → { at, missing }
let history = []; // { at, requested, missing }

export function modelName() {
  return shape?.model ?? "";
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A canvas context in CSS pixels, sharp on every screen.
function context(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

function drawExperts(now) {
  const { pen, width, height } = context($("experts"));
  if (!shape) return;
  const w = width / shape.experts;
  const h = height / shape.layers;
  const gap = w > 4 && h > 4 ? 1 : 0;
  pen.fillStyle = colour("--cell");
  if (gap) {
    for (let layer = 0; layer < shape.layers; layer++)
      for (let e = 0; e < shape.experts; e++) pen.fillRect(e * w, layer * h, w - gap, h - gap);
  } else pen.fillRect(0, 0, width, height);
  const memory = colour("--memory");
  const disk = colour("--disk");
  for (const [cell, { at, missing }] of cells) {
    const left = 1 - (now - at) / FADE;
    if (left <= 0) { cells.delete(cell); continue; }
    pen.globalAlpha = Math.min(1, 0.15 + left);
    pen.fillStyle = missing ? disk : memory;
    const layer = Math.floor(cell / shape.experts);
    pen.fillRect((cell % shape.experts) * w, layer * h, Math.max(w - gap, 1.5), Math.max(h - gap, 1.5));
  }
  pen.globalAlpha = 1;
}

function drawRate(now) {
  const { pen, width, height } = context($("rate"));
  pen.strokeStyle = colour("--line");
  pen.strokeRect(0.5, 0.5, width - 1, height - 1);
  history = history.filter(({ at }) => now - at < WINDOW * 1000);
  pen.strokeStyle = colour("--memory");
  pen.lineWidth = 2;
  pen.beginPath();
  for (const { at, requested, missing } of history) {
    if (!requested) continue;
    const x = width * (1 - (now - at) / (WINDOW * 1000));
    pen.lineTo(x, 2 + (height - 4) * (missing / requested));
  }
  pen.stroke();
}

function size(bytes) {
  for (const unit of ["B", "kB", "MB"]) {
    if (bytes < 999.5) return `${bytes < 99.95 && unit !== "B" ? bytes.toFixed(1) : Math.round(bytes)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toFixed(1)} GB`;
}

function take(event) {
  const now = performance.now();
  if (event.model) {
    shape = event;
    $("model").textContent = `${event.model} · ${event.layers} layers of ${event.experts} experts, ${event.experts_per_token} per token`;
    $("axes").textContent = `${event.layers} rows: layers · ${event.experts} columns: experts`;
    return;
  }
  for (const [layer, expert, missing] of event.uses) cells.set(layer * shape.experts + expert, { at: now, missing });
  history.push({ at: now, requested: event.bytes_requested, missing: event.bytes_missing, tokens: event.tokens });
  const recent = history.filter(({ at }) => now - at < 3000);
  const sum = (name) => recent.reduce((total, entry) => total + entry[name], 0);
  const tokens = sum("tokens");
  const seconds = (now - recent[0].at) / 1000;
  if (tokens && seconds > 0.3) {
    $("speed").textContent = (tokens / seconds).toFixed(1);
    $("bytes").textContent = size(sum("requested") / tokens);
  }
  const share = 1 - sum("missing") / Math.max(1, sum("requested"));
  $("hits").textContent = share === 1 ? "100%" : `${Math.min(99, Math.floor(100 * share))}%`;
}

export async function watchExperts(headers, events) {
  const draw = (now) => {
    drawExperts(now);
    drawRate(now);
    requestAnimationFrame(draw);
  };
  requestAnimationFrame(draw);
  for (;;) {
    try {
      const response = await fetch("/experts", { headers: headers() });
      if (response.status === 401) $("model").textContent = "The server wants an API key: see Settings.";
      if (response.ok) for await (const event of events(response)) take(event);
    } catch {
      $("model").textContent = "The server does not answer.";
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}
