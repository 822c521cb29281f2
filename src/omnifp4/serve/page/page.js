"use strict";
// The chat page. It speaks the server's own OpenAI API, and shows what a model wrote as text and never as markup.

const RATE_IN = 16000;
const RATE_OUT = 24000;
const MOST_PIXELS = 4_000_000;

const at = (id) => document.getElementById(id);
const log = at("log");
const question = at("question");
const composer = at("composer");

const state = {
  messages: [],     // as the API takes them
  attached: [],     // {kind, name, part, url}
  status: null,     // the server's
  answer: null,     // {controller, player} while one is under way
  recorder: null,
  context: null,    // AudioContext
  player: null,     // of the latest spoken answer, which may play on after its text is done
};

// Small things

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function tell(text) { at("said").textContent = text; }

function warn(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function size(bytes) {
  if (bytes >= 1e9) return `${(bytes / 1e9).toFixed(bytes >= 1e10 ? 1 : 2)} GB`;
  if (bytes >= 1e6) return `${(bytes / 1e6).toFixed(bytes >= 1e8 ? 0 : 1)} MB`;
  return `${Math.max(1, Math.round(bytes / 1e3))} kB`;
}

function count(number) {
  if (number >= 1e9) return `${(number / 1e9).toFixed(2)} B`;
  if (number >= 1e6) return `${(number / 1e6).toFixed(2)} M`;
  return `${Math.round(number / 1e3)} k`;
}

function headers() {
  const key = at("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function fault(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

// Colours

function chooseTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  at("theme").setAttribute("aria-pressed", String(dark));
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const kept = localStorage.getItem("theme");
chooseTheme(kept ? kept === "dark" : prefersDark.matches);
prefersDark.addEventListener("change", (event) => { if (!localStorage.getItem("theme")) chooseTheme(event.matches); });
at("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  localStorage.setItem("theme", dark ? "dark" : "light");
  chooseTheme(dark);
});

// The server's state

async function refresh() {
  let response;
  try {
    response = await fetch("/v1/omnifp4/status", { headers: headers() });
  } catch {
    at("engine").textContent = "the server does not answer";
    return;
  }
  if (response.status === 401) {
    at("engine").textContent = "an API key is needed: see the settings";
    return;
  }
  if (!response.ok) {
    at("engine").textContent = await fault(response);
    return;
  }
  const first = state.status === null;
  state.status = await response.json();
  show(state.status, first);
}

function show(status, first) {
  at("model").textContent = status.model;
  document.title = status.model;
  const others = status.running > 1 ? `, ${status.running} answers under way` : "";
  at("engine").textContent = `${status.device}, engine ${status.engine.name}${others}`;
  at("engine").title = status.engine.reason;
  at("memory").textContent = size(status.memory.bytes);
  at("memory").title = `${status.memory.where === "gpu" ? "on the GPU" : "of the process"}, of ${size(status.memory.total)}`;
  const all = status.weights.reduce((sum, one) => sum + one.parameters, 0);
  const fp4 = status.weights.reduce((sum, one) => sum + one.fp4_parameters, 0);
  at("weights-open").textContent = all ? `${Math.round(100 * fp4 / all)} %` : "unknown";
  at("weights-open").setAttribute("aria-label", all ? `${Math.round(100 * fp4 / all)} percent of the weights; show which` : "Which weights are FP4");
  if (!first) return;
  at("speak").hidden = status.voices.length === 0;
  at("voice").replaceChildren(...status.voices.map((name) => make("option", { text: name, selected: name === "Ethan" })));
  at("parts").replaceChildren(...status.weights.map((one) => {
    const share = one.parameters ? one.fp4_parameters / one.parameters : 0;
    const percent = `${Math.round(100 * share)} %`;
    return make("tr", {},
      make("th", { scope: "row", text: one.part }),
      make("td", { text: count(one.parameters) }),
      make("td", {}, make("meter", { min: 0, max: 1, value: share, "aria-hidden": "true" }), percent),
      make("td", { text: size(one.bytes) }));
  }));
  at("weights-note").textContent = all
    ? `${count(fp4)} of ${count(all)} parameters are stored in 4 bits with a scale for every 16; the rest stay in 16 bits.`
    : "The server does not know the files of this model.";
}

setInterval(() => { if (!document.hidden) refresh(); }, 5000);
at("key").addEventListener("change", () => { state.status = null; refresh(); });
at("settings-open").addEventListener("click", () => at("settings").showModal());
at("weights-open").addEventListener("click", () => at("weights").showModal());
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
}

// Attachments

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function smaller(file) {
  // A phone's photo has ten times the pixels that the model looks at.
  if (file.type === "image/gif" || file.type === "image/svg+xml") return file;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return file; // the server knows more formats than the browser, and says what is wrong
  }
  const scale = Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height));
  if (scale >= 1) return file;
  const canvas = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(blob || file), "image/jpeg", 0.9));
}

const AUDIO_NAMES = { mpeg: "mp3", "x-wav": "wav", wave: "wav", "vnd.wave": "wav", mp4: "m4a", "x-m4a": "m4a", "x-flac": "flac", "x-aiff": "aiff" };

async function attach(file, name = file.name) {
  const kind = file.type.split("/")[0];
  const limits = state.status ? state.status.limits : { body_bytes: Infinity, media: Infinity };
  if (!["image", "audio", "video"].includes(kind)) { warn(`${name} is no picture, sound or video`); return; }
  if (state.attached.length >= limits.media) { warn(`a message holds ${limits.media} files at most`); return; }
  const content = kind === "image" ? await smaller(file) : file;
  if (content.size * 4 / 3 > limits.body_bytes) { warn(`${name} is larger than the server takes (${size(limits.body_bytes * 3 / 4)})`); return; }
  const data = await base64(content);
  let part;
  if (kind === "image") part = { type: "image_url", image_url: { url: data } };
  else if (kind === "video") part = { type: "video_url", video_url: { url: data } };
  else {
    const subtype = file.type.split("/")[1].split(";")[0];
    part = { type: "input_audio", input_audio: { data: data.slice(data.indexOf(",") + 1), format: AUDIO_NAMES[subtype] || subtype } };
  }
  state.attached.push({ kind, name, part, url: URL.createObjectURL(content) });
  warn("");
  showAttached();
  tell(`${name} is attached`);
}

function showAttached() {
  const list = at("attached");
  list.hidden = state.attached.length === 0;
  list.replaceChildren(...state.attached.map((one, place) => {
    const away = make("button", { type: "button", class: "icon", "aria-label": `Remove ${one.name}`, title: "Remove" });
    away.append(icon("M6 6l12 12M18 6 6 18"));
    away.addEventListener("click", () => {
      URL.revokeObjectURL(one.url);
      state.attached.splice(place, 1);
      showAttached();
      question.focus();
    });
    const preview = one.kind === "image" ? [make("img", { src: one.url, alt: "" })] : [];
    return make("li", {}, ...preview, make("span", { text: one.name }), away);
  }));
}

function icon(path) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

at("attach").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", async () => {
  for (const file of [...at("files").files]) await attach(file);
  at("files").value = "";
  question.focus();
});

let inside = 0;
const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
addEventListener("dragenter", (event) => { if (carriesFiles(event)) { inside += 1; at("drop").hidden = false; } });
addEventListener("dragleave", (event) => { if (carriesFiles(event)) { inside -= 1; at("drop").hidden = inside <= 0; } });
addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });
addEventListener("drop", async (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  inside = 0;
  at("drop").hidden = true;
  for (const file of [...event.dataTransfer.files]) await attach(file);
});
addEventListener("paste", async (event) => {
  const files = [...(event.clipboardData ? event.clipboardData.files : [])];
  if (files.length === 0) return;
  event.preventDefault();
  for (const file of files) await attach(file, file.name || "pasted");
});

// Microphone

function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + samples.length * 2));
  const text = (place, letters) => [...letters].forEach((letter, step) => view.setUint8(place + step, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + samples.length * 2, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, rate * 2, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, samples.length * 2, true);
  samples.forEach((sample, step) => view.setInt16(44 + step * 2, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

async function asWav(recording) {
  // Rendering resamples to the rate that the model hears.
  const decoder = new OfflineAudioContext(1, 1, RATE_IN);
  const decoded = await decoder.decodeAudioData(await recording.arrayBuffer());
  const offline = new OfflineAudioContext(1, Math.max(1, Math.ceil(decoded.duration * RATE_IN)), RATE_IN);
  const source = offline.createBufferSource();
  source.buffer = decoded;
  source.connect(offline.destination);
  source.start();
  return wav((await offline.startRendering()).getChannelData(0), RATE_IN);
}

async function record() {
  if (state.recorder) { state.recorder.stop(); return; }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true } });
  } catch (error) {
    warn(navigator.mediaDevices ? `the microphone cannot be used: ${error.message}` : "the microphone needs https or localhost");
    return;
  }
  const pieces = [];
  const recorder = new MediaRecorder(stream);
  state.recorder = recorder;
  const began = performance.now();
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  recorder.addEventListener("stop", async () => {
    state.recorder = null;
    for (const track of stream.getTracks()) track.stop();
    at("record").setAttribute("aria-pressed", "false");
    at("record").setAttribute("aria-label", "Record with the microphone");
    try {
      const blob = await asWav(new Blob(pieces, { type: recorder.mimeType }));
      await attach(blob, `recording, ${((performance.now() - began) / 1000).toFixed(1)} s`);
    } catch (error) {
      warn(`the recording cannot be read: ${error.message}`);
    }
    question.focus();
  });
  recorder.start();
  at("record").setAttribute("aria-pressed", "true");
  at("record").setAttribute("aria-label", "Stop recording");
  tell("recording");
}
at("record").addEventListener("click", record);

// Speech

class Player {
  // Plays pieces one after the other without a gap, and keeps them to be heard again.
  constructor() {
    state.context = state.context || new AudioContext({ sampleRate: RATE_OUT });
    state.context.resume();
    this.pieces = [];
    this.samples = 0;
    this.next = 0;
    this.sources = [];
    this.odd = null;
    this.quiet = false; // what still comes is kept, not played
  }

  add(text) {
    let bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    if (this.odd !== null) bytes = Uint8Array.of(this.odd, ...bytes);
    this.odd = bytes.length % 2 ? bytes[bytes.length - 1] : null;
    const view = new DataView(bytes.buffer, 0, bytes.length - (bytes.length % 2));
    const piece = new Float32Array(view.byteLength / 2);
    for (let step = 0; step < piece.length; step += 1) piece[step] = view.getInt16(step * 2, true) / 32768;
    if (piece.length === 0) return;
    this.pieces.push(piece);
    this.samples += piece.length;
    if (this.quiet) return;
    const buffer = state.context.createBuffer(1, piece.length, RATE_OUT);
    buffer.copyToChannel(piece, 0);
    const source = state.context.createBufferSource();
    source.buffer = buffer;
    source.connect(state.context.destination);
    this.next = Math.max(this.next, state.context.currentTime + 0.05);
    source.start(this.next);
    this.next += buffer.duration;
    this.sources.push(source);
  }

  stop() {
    this.quiet = true;
    for (const source of this.sources) source.stop();
    this.sources = [];
  }

  recording() {
    const all = new Float32Array(this.samples);
    let place = 0;
    for (const piece of this.pieces) { all.set(piece, place); place += piece.length; }
    return wav(all, RATE_OUT);
  }
}

at("speak").addEventListener("click", () => {
  const on = at("speak").getAttribute("aria-pressed") !== "true";
  if (!on) hush();
  at("speak").setAttribute("aria-pressed", String(on));
});

// Ends what is being spoken.
function hush() {
  if (state.player) state.player.stop();
  state.player = null;
}

// The conversation

function near() { return log.scrollHeight - log.scrollTop - log.clientHeight < 80; }
function follow() { log.scrollTop = log.scrollHeight; }

function showQuestion(text, attached) {
  at("empty").hidden = true;
  const article = make("article", { class: "user", "aria-label": "You" });
  if (attached.length) {
    article.append(make("div", { class: "media" }, ...attached.map((one) => {
      if (one.kind === "image") return make("img", { src: one.url, alt: one.name });
      return make(one.kind, { src: one.url, controls: true, preload: "metadata", "aria-label": one.name });
    })));
  }
  if (text) article.append(make("p", { text }));
  log.append(article);
  follow();
  return article;
}

function wishes(speak) {
  const body = { model: state.status.model, messages: [], stream: true, stream_options: { include_usage: true } };
  const system = at("system").value.trim();
  if (system) body.messages.push({ role: "system", content: system });
  body.messages.push(...state.messages);
  for (const [name, field] of [["max_completion_tokens", "most"], ["temperature", "temperature"], ["seed", "seed"]]) {
    if (at(field).value !== "") body[name] = Number(at(field).value);
  }
  if (speak) {
    body.modalities = ["text", "audio"];
    body.audio = { voice: at("voice").value || "default", format: "pcm16" };
  }
  return body;
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    waiting += value;
    let end;
    while ((end = waiting.indexOf("\n\n")) >= 0) {
      const event = waiting.slice(0, end);
      waiting = waiting.slice(end + 2);
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask() {
  const text = question.value.trim();
  const attached = state.attached;
  if (!text && attached.length === 0) { question.focus(); return; }
  if (!state.status) { warn("the server has not answered yet"); await refresh(); if (!state.status) return; }
  warn("");
  hush();
  const speak = at("speak").getAttribute("aria-pressed") === "true" && !at("speak").hidden;
  const parts = [...attached.map((one) => one.part), ...(text ? [{ type: "text", text }] : [])];
  state.messages.push({ role: "user", content: attached.length ? parts : text });
  state.attached = [];
  showAttached();
  question.value = "";
  grow();
  const asked = showQuestion(text, attached);
  const article = make("article", { class: "assistant under-way", "aria-label": "Answer", "aria-busy": "true" });
  const shown = make("p", { class: "text" });
  article.append(shown);
  log.append(article);
  follow();
  const answer = { controller: new AbortController(), player: speak ? new Player() : null, dropped: false };
  state.answer = answer;
  state.player = answer.player;
  composer.classList.add("busy");
  at("send").setAttribute("aria-label", "Stop");
  at("send").title = "Stop";
  tell("the answer is being made");
  const figures = { sent: performance.now(), first: 0, last: 0, pieces: 0, usage: null };
  let said = "";
  let problem = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify(wishes(speak)),
      signal: answer.controller.signal,
    });
    if (!response.ok) throw new Error(await fault(response));
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) figures.usage = event.usage;
      const delta = event.choices.length ? event.choices[0].delta : {};
      const piece = delta.content || (delta.audio && delta.audio.transcript) || "";
      if (piece) {
        figures.last = performance.now();
        figures.first = figures.first || figures.last;
        figures.pieces += 1;
        const followed = near();
        said += piece;
        shown.textContent = said.trimStart();
        if (followed) follow();
        if (figures.pieces > 1) at("rate").textContent = rateText((figures.pieces - 1) / ((figures.last - figures.first) / 1000));
      }
      if (delta.audio && delta.audio.data && answer.player) {
        answer.player.add(delta.audio.data);
        article.dataset.samples = answer.player.samples;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") problem = error.message;
  }
  finish(article, asked, answer, figures, said, problem);
}

function rateText(rate) { return Number.isFinite(rate) ? `${rate >= 100 ? Math.round(rate) : rate.toFixed(1)} tok/s` : "–"; }

function finish(article, asked, answer, figures, said, problem) {
  const stopped = answer.controller.signal.aborted;
  article.classList.remove("under-way");
  article.setAttribute("aria-busy", "false");
  if (answer.dropped) problem = "";
  else if (said || !problem) state.messages.push({ role: "assistant", content: said });
  else state.messages.pop();
  if (figures.usage) {
    const made = figures.usage.completion_tokens - figures.usage.completion_tokens_details.audio_tokens;
    const rate = (made - 1) / ((figures.last - figures.first) / 1000);
    const pieces = [`${figures.usage.prompt_tokens} + ${made} tokens`];
    if (figures.first) pieces.push(`first after ${((figures.first - figures.sent) / 1000).toFixed(2)} s`);
    if (made > 1 && rate > 0 && Number.isFinite(rate)) {
      pieces.push(rateText(rate));
      at("rate").textContent = rateText(rate);
    }
    if (answer.player && answer.player.samples) pieces.push(`${(answer.player.samples / RATE_OUT).toFixed(1)} s of speech`);
    article.append(make("p", { class: "told", text: pieces.join(" · ") }));
  }
  if (stopped) article.append(make("p", { class: "told", text: "stopped" }));
  if (problem) {
    article.append(make("p", { class: "fault", role: "alert", text: problem }));
    if (!said) question.value = question.value || (asked.querySelector("p") || { textContent: "" }).textContent;
  }
  if (answer.player && answer.player.samples) {
    const again = make("audio", { controls: true, "aria-label": "The spoken answer", src: URL.createObjectURL(answer.player.recording()) });
    again.addEventListener("play", hush);
    article.insertBefore(again, article.querySelector(".told"));
  }
  if (stopped) hush();
  state.answer = null;
  composer.classList.remove("busy");
  at("send").setAttribute("aria-label", "Send");
  at("send").title = "Send";
  tell(problem ? "" : `answer: ${said}`);
  follow();
  refresh();
}

// Ends the answer under way.
function stop() { if (state.answer) state.answer.controller.abort(); }

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.answer) stop();
  else ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!state.answer) ask();
});
addEventListener("keydown", (event) => { if (event.key === "Escape" && !document.querySelector("dialog[open]")) { stop(); hush(); } });

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}
question.addEventListener("input", grow);

at("reset").addEventListener("click", () => {
  if (state.answer) state.answer.dropped = true;
  stop();
  hush();
  state.messages = [];
  state.attached.forEach((one) => URL.revokeObjectURL(one.url));
  state.attached = [];
  showAttached();
  for (const article of log.querySelectorAll("article")) {
    for (const media of article.querySelectorAll("[src^='blob:']")) URL.revokeObjectURL(media.src);
    article.remove();
  }
  at("empty").hidden = false;
  at("rate").textContent = "–";
  warn("");
  tell("new conversation");
  question.focus();
});

refresh();
question.focus();
