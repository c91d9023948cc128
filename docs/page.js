/* The page: reads files, draws what is in them, and lets slots be toggled, dragged, heard and downloaded.

   recompose.js computes, in a worker, so that the page never freezes; `ask` calls it. It is started from a Blob, which
   binds it to this page's Content-Security-Policy. */
"use strict";

const HERE = new URL(".", document.baseURI), MODELS = { picture: "../models/clevr/", sound: "../models/nsynth-duo/" };
const EXAMPLES = { picture: ["a.png", "b.png"], sound: ["a.flac", "b.flac"] };
const RUNTIME = new URLSearchParams(location.search).get("ort")?.replace(/\/?$/, "/") // the folder of a copy
  ?? "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/";
const EXPECTED = "one or two pictures (PNG, JPEG, WebP), or one or two sounds (WAV, FLAC, MP3, Ogg)";
const LOWEST = 32.7; // Hz: where the models' logarithmic frequency axis begins, a C1
const HEAT = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]]; // inferno

class Sentence extends Error {} // says what is wrong and what was expected, for the reader of the page

const $ = (id) => document.getElementById(id);
const sum = (numbers) => numbers.reduce((total, x) => total + x, 0);

/** An element of this tag, with these properties and children. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// ---------------------------------------------------------------- The worker

let worker, running; // promises: of the worker, and of onnxruntime-web running in it
const waiting = new Map(); // what is asked, by number

async function startWorker() {
  if (location.protocol === "file:") {
    throw new Sentence("Opened as a file, this page may read nothing; run python -m http.server in the repository's "
      + "folder, and open http://localhost:8000/docs/.");
  }
  if (typeof WebAssembly === "undefined") {
    throw new Sentence("This browser has no WebAssembly, or it is switched off; the models need it.");
  }
  const answer = await fetch("recompose.js").catch(() => ({}));
  if (!answer.ok) throw new Sentence("recompose.js could not be fetched; it stands beside this page in docs/.");
  const made = new Worker(URL.createObjectURL(await answer.blob()));
  made.onmessage = ({ data: { id, value, error } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error) reject(new Sentence(error));
    else resolve(value);
  };
  made.onerror = ({ message }) => { // out of memory, say
    for (const { reject } of waiting.values()) reject(new Error(message));
    waiting.clear();
    made.terminate();
    worker = running = null; // the next call starts another
  };
  return made;
}

/** Call a function of recompose.js. */
async function ask(call, ...args) {
  const to = await (worker ??= startWorker());
  return new Promise((resolve, reject) => {
    const id = ask.count = (ask.count ?? 0) + 1;
    waiting.set(id, { resolve, reject });
    to.postMessage({ id, call, args });
  });
}

/** Have the runtime running; a try that failed is made again. */
function start() {
  running ??= ask("start", new URL(RUNTIME, HERE).href).catch((error) => {
    worker?.then((made) => made.terminate(), () => {});
    worker = running = null;
    throw error;
  });
  return running;
}

// ---------------------------------------------------------------- Files

/** "picture", "sound" or nothing, by a file's first bytes: names may lie, and may be missing. */
async function kindOf(file) {
  const bytes = new Uint8Array(await file.slice(0, 16).arrayBuffer().catch(() => new ArrayBuffer(0)));
  const text = String.fromCharCode(...bytes), [first, second] = bytes;
  if (/^(RIFF....WAVE|fLaC|OggS|ID3|....ftypM4A|caff)/s.test(text)) return "sound";
  if (/^....ftyp/s.test(text) && (/\.m4a$/i.test(file.name) || /^audio/.test(file.type))) return "sound";
  if (/^(\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|....ftyp|II\*\0|MM\0\*)/s.test(text)) return "picture";
  return first === 0xff && second >= 0xe0 ? "sound" : undefined; // MPEG frames without a header
}

/** The samples of a WAV file of integers or floats, at most `seconds` of them; nothing for other codings. */
function readWav(bytes, seconds, fileSize) {
  const view = new DataView(bytes), found = {};
  for (let at = 12; at + 8 <= bytes.byteLength && !found.data;) {
    const id = String.fromCharCode(...new Uint8Array(bytes, at, 4)), size = view.getUint32(at + 4, true);
    found[id.trim()] = { at: at + 8, size };
    at += 8 + size + (size % 2);
  }
  if (!found.fmt || !found.data) throw new RangeError("no samples");
  const { at } = found.fmt, channels = view.getUint16(at + 2, true), rate = view.getUint32(at + 4, true);
  const bits = view.getUint16(at + 14, true), size = bits / 8, tag = view.getUint16(at, true);
  const coding = tag === 0xfffe ? view.getUint16(at + 24, true) : tag; // 1: integers, 3: floats
  const read = {
    "1,8": (i) => (view.getUint8(i) - 128) / 128,
    "1,16": (i) => view.getInt16(i, true) / 2 ** 15,
    "1,24": (i) => (view.getInt8(i + 2) * 2 ** 16 + view.getUint16(i, true)) / 2 ** 23,
    "1,32": (i) => view.getInt32(i, true) / 2 ** 31,
    "3,32": (i) => view.getFloat32(i, true),
    "3,64": (i) => view.getFloat64(i, true),
  }[[coding, bits]];
  if (!read) return null;
  const there = fileSize - found.data.at, endless = found.data.size === 2 ** 32 - 1; // of a stream
  const length = Math.floor((endless ? there : found.data.size) / size / channels);
  const n = Math.min(length, Math.ceil(seconds * rate)), start = found.data.at;
  const whole = endless || found.data.size <= there;
  const of = (c) => Float32Array.from({ length: n }, (_, i) => read(start + (i * channels + c) * size));
  return whole ? { channels: Array.from({ length: channels }, (_, c) => of(c)), rate, length } : { rate, cutOff: true };
}

/** Rate in Hz and samples, where known, of a compressed sound, so that the browser decodes it at its own rate. */
function compressedForm(bytes) {
  const view = new DataView(bytes), head = String.fromCharCode(...new Uint8Array(bytes.slice(0, 200)));
  if (head.startsWith("fLaC")) {
    return { rate: view.getUint32(18) >>> 12, length: (view.getUint8(21) & 15) * 2 ** 32 + view.getUint32(22) };
  }
  const vorbis = head.indexOf("\x01vorbis");
  if (vorbis > 0) return { rate: view.getUint32(vorbis + 12, true) };
  if (head.includes("OpusHead")) return { rate: 48000 };
  const size = (i) => view.getUint8(i) & 127, tag = head.startsWith("ID3"); // whose size has 7 bits a byte
  const mpeg = tag || (view.getUint8(0) === 0xff && view.getUint8(1) & 6); // of a layer: AAC, as MP4, has none
  if (!mpeg) return { rate: 48000 };
  let at = tag ? 10 + size(6) * 2 ** 21 + size(7) * 2 ** 14 + size(8) * 2 ** 7 + size(9) : 0;
  for (const end = Math.min(at + 65536, bytes.byteLength - 3); at < end; at++) {
    const bits = view.getUint16(at), version = (bits >> 3) & 3, index = (view.getUint8(at + 2) >> 2) & 3;
    if (bits >= 0xffe0 && version !== 1 && (bits >> 1) & 3 && index < 3) {
      return { rate: [44100, 48000, 32000][index] / { 3: 1, 2: 2, 0: 4 }[version] };
    }
  }
  return { rate: 44100 };
}

/** A sound file -> { name, channels, rate, notes }, of at most the `seconds` that the model hears. */
async function readSound(file, seconds) {
  const longest = seconds + 0.02, fault = (text) => new Sentence(`${file.name} ${text}; expected a whole sound.`);
  if (file.size > 2 ** 28 && file.name.search(/\.wav$/i) < 0) throw fault("is larger than 268 MB");
  const form = await decodeSound(file, longest).catch(() => null);
  if (!form) throw fault("is damaged, or no sound that this browser reads");
  const { rate, length, cutOff } = form, whole = length <= Math.round(longest * rate);
  if (cutOff) throw fault("is cut off");
  if (!(rate >= 4000 && rate <= 192000)) throw new Sentence(`${file.name} has ${rate} Hz; expected 4 to 192 kHz.`);
  const channels = form.channels.map((one) => one.slice(0, whole ? length : Math.round(seconds * rate)));
  if (!channels[0]?.length) throw fault("is empty");
  const loud = channels[0].some((_, i) => Math.abs(sum(channels.map((one) => one[i]))) >= 1e-5 * channels.length);
  if (!channels.every((one) => one.every(Number.isFinite))) throw fault("has samples that are NaN or infinite");
  if (!loud) throw fault(whole ? "is silent" : `is silent for its first ${seconds} seconds`);
  const note = `Only its first ${seconds} seconds are used; recompose.py takes longer ones apart.`;
  return { name: file.name, channels, rate, notes: whole ? [] : [note] };
}

async function decodeSound(file, longest) {
  if (/^RIFF/.test(await file.slice(0, 4).text())) {
    const start = await file.slice(0, 2 ** 25).arrayBuffer(); // more than any first four seconds take
    const found = readWav(start, longest, file.size);
    if (found) return found;
  }
  const bytes = await file.arrayBuffer(), { rate, length } = compressedForm(bytes);
  const buffer = await new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, c) => buffer.getChannelData(c));
  return { channels, rate, length: buffer.length, cutOff: length && buffer.length < length - rate / 10 };
}

// ---------------------------------------------------------------- What is open

let kind, model; // "picture" or "sound", and its model.json
let inputs = [], result, chosen; // what is in each; their recomposition; the slot to edit

const modelOf = (sort) => new URL(MODELS[sort], HERE).href;

/** Have a model loaded, and what its model.json says. */
async function ready(sort) {
  await start();
  return ask("about", modelOf(sort));
}

let opening = Promise.resolve(), opens = 0; // what is opened last, and how many wait: one goes after the other

/** Take files, or what a function fetches, apart, in place of what was open; where that fails, a sentence says why, and
    what was open stays. */
function open(files) {
  busy(++opens);
  opening = opening.then(() => takeApart(files)).catch((error) => {
    say("");
    complain(error instanceof Sentence ? error.message : `This failed: ${error.message}`);
  }).finally(() => busy(--opens));
  return opening;
}

function busy(state) {
  $("main").ariaBusy = $("work").inert = Boolean(state);
}

async function takeApart(given) {
  await updating; // which needs what is open, and says how it went
  complain("");
  const files = typeof given === "function" ? await given() : given;
  const wanted = await kindOfAll(files);
  say("Loading the model …");
  const about = await ready(wanted), seconds = about.samples / about.sample_rate, read = [];
  say(`Taking ${files.map((file) => file.name).join(" and ")} apart …`);
  for (const file of files) read.push(wanted === "sound" ? await readSound(file, seconds) : file);
  await updating;
  clearTimeout(sing.later);
  const found = await ask("open", modelOf(wanted), read);
  stop();
  [kind, model, result, chosen] = [wanted, about, null, null];
  inputs = found.map((input, i) => {
    const notes = [...(read[i].notes ?? []), ...input.notes];
    return { ...input, i, name: files[i].name, notes };
  });
  inputs.forEach(prepare);
  build();
  await update();
}

/** The kind that one or two files have, both the same; a sentence about all others. */
async function kindOfAll(files) {
  if (files.length < 1 || files.length > 2) {
    throw new Sentence(`${files.length} files were given; expected ${EXPECTED}.`);
  }
  const kinds = await Promise.all(files.map(kindOf)), bad = kinds.indexOf(undefined);
  if (bad >= 0) throw new Sentence(`${files[bad].name} is neither a picture nor a sound; expected ${EXPECTED}.`);
  if (new Set(kinds).size > 1) throw new Sentence(`A picture and a sound cannot be recomposed; expected ${EXPECTED}.`);
  return kinds[0];
}

/** At first: the whole first input, and the strongest slot of the second. */
function prepare(input) {
  input.slots.forEach((slot, k) => {
    const empty = slot.nats < (model.empty ?? 0);
    Object.assign(slot, { input, k, empty, kept: !empty && (input.i === 0 || k === 0) });
    slot.first ??= { alone: slot.alone, tile: slot.tile };
    putBack(slot);
  });
}

function putBack(slot) {
  Object.assign(slot, { move: [0, 0], front: false, semitones: 0, ...slot.first });
  if (slot.canvas) paintSlot(slot); // what is left out is not drawn again with the rest
}

const allSlots = () => inputs.flatMap((input) => input.slots);
const nameOf = (slot) => `${inputs.length > 1 ? "AB"[slot.input.i] : ""}${slot.k}`;

let stale = false, updating; // whether something changed since the recomposition that is being made

/** Recompose, as often as things have changed meanwhile. */
function update() {
  stale = true;
  place();
  $("stage").classList.add("busy");
  updating ??= recompose().finally(() => {
    updating = null;
    $("stage").classList.remove("busy");
  });
  return updating;
}

async function recompose() {
  while (stale) {
    stale = false;
    const started = performance.now(), kept = allSlots().filter((slot) => slot.kept);
    const wanted = kept.map(({ input, k, ...edits }) => {
      const { move, front, semitones } = edits;
      return { input: input.i, slot: k, move, front, semitones };
    });
    try {
      if (kept.some((slot) => slot.semitones)) say("Singing …");
      const found = await ask("recompose", wanted);
      complain("");
      draw(found);
      const seconds = ((performance.now() - started) / 1000).toFixed(2);
      if (!stale) say(`Recomposed from ${kept.length} of ${allSlots().length} slots in ${seconds} s.`);
    } catch (error) {
      complain(error.message);
    }
  }
}

// ---------------------------------------------------------------- Drawing

/** 0 (black) to 1 (light yellow) -> [r, g, b]. */
function heat(value) {
  const at = Math.min(1, Math.max(0, value)) * (HEAT.length - 1), i = Math.min(HEAT.length - 2, Math.floor(at));
  return HEAT[i].map((c, j) => c + (at - i) * (HEAT[i + 1][j] - c));
}
const PALETTE = Array.from({ length: 256 }, (_, i) => heat(i / 255));

/** Fill a canvas of these sides with colour(i) -> [r, g, b, opaque]. */
function paint(canvas, width, height, colour) {
  const brush = Object.assign(canvas, { width, height }).getContext("2d"), image = brush.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b, opaque = 255] = colour(i);
    image.data[4 * i] = r;
    image.data[4 * i + 1] = g;
    image.data[4 * i + 2] = b;
    image.data[4 * i + 3] = opaque;
  }
  brush.putImageData(image, 0, 0);
  return canvas;
}

function paintPixels(canvas, pixels, change = (colour) => colour) {
  const side = Math.sqrt(pixels.length / 3);
  return paint(canvas, side, side, (i) => change(pixels.subarray(3 * i, 3 * i + 3)));
}

function paintTile(canvas, { values, rows, columns }, change = (colour) => colour) {
  return paint(canvas, columns, rows, (i) => change(PALETTE[values[i]]));
}

function paintInput(canvas, { pixels, tile: spectrum }, change) {
  return pixels ? paintPixels(canvas, pixels, change) : paintTile(canvas, spectrum, change);
}

const paintSlot = (slot) => (slot.alone ? paintPixels(slot.canvas, slot.alone) : paintTile(slot.canvas, slot.tile));

/** A KL map over its input, in grey: from half of the highest on all is heat. */
function paintMap(canvas, input) {
  const { values, rows, columns } = input.map, top = Math.max(...values, 1e-9), side = 384;
  const map = paint(element("canvas"), columns, rows, (i) => {
    const row = Math.floor(i / columns), up = kind === "sound" ? rows - 1 - row : row; // low notes are below
    const value = values[up * columns + (i % columns)] / top;
    return [...heat(value), 255 * Math.min(1, 2 * value)];
  });
  const behind = paintInput(element("canvas"), input, (colour) => Array(3).fill(0.2 * sum([...colour])));
  const brush = Object.assign(canvas, { width: side, height: side }).getContext("2d");
  brush.drawImage(behind, 0, 0, side, side);
  brush.imageSmoothingEnabled = false;
  brush.drawImage(map, 0, 0, side, side);
}

/** Where a cell is, in shares of the width from the left, and of the height from the top. */
function spot([y, x]) {
  return [(x + 1) / 2, kind === "sound" ? (1 - y) / 2 : (y + 1) / 2];
}

/** Place a node there, but within the picture by `edge`. */
function put(node, place, edge = 0.05) {
  [node.style.left, node.style.top] = place.map((share) => `${100 * Math.min(1 - edge, Math.max(edge, share))}%`);
}

/** The cards of the inputs, and a handle for every slot. */
function build() {
  document.body.className = `working ${kind}`;
  $("work").hidden = false;
  for (const axis of document.querySelectorAll(".axis")) axis.remove();
  if (kind === "sound") $("stage").append(...axes());
  $("play").hidden = kind !== "sound";
  $("download").textContent = kind === "sound" ? "Download WAV" : "Download PNG";
  $("inputs").replaceChildren(...inputs.map(card));
  $("handles").replaceChildren(...allSlots().map(handle));
}

function axes() {
  const seconds = Math.max(...inputs.map(({ channels, rate }) => channels[0].length / rate));
  const label = (text, style) => element("span", { className: "axis", ariaHidden: "true", style }, text);
  return [
    label(`${model.sample_rate / 2000} kHz`, "left: 0; top: 0"),
    label(`${Math.round(LOWEST)} Hz`, "left: 0; bottom: 0"),
    label(`${Number(seconds.toPrecision(3))} s`, "right: 0; bottom: 0"),
  ];
}

function card(input) {
  const held = input.slots.filter((slot) => !slot.empty).length, empty = input.slots.length - held;
  const what = `${held} ${kind === "sound" ? "note" : "object"}${held === 1 ? "" : "s"}`;
  const spare = empty ? `, ${empty} empty slot${empty === 1 ? "" : "s"}` : "", letter = "AB"[input.i];
  const picture = element("canvas", { role: "img", ariaLabel: `${input.name}, as the model sees it` });
  const map = element("canvas", { role: "img", ariaLabel: "KL map: where the model finds something" });
  paintInput(picture, input);
  paintMap(map, input);
  input.marks = input.slots.map(({ k }) => element("span", { ariaHidden: "true" }, element("span", {}, `${k}`)));
  input.marks.forEach((mark, k) => put(mark, spot(input.slots[k].cell)));
  const heard = kind === "sound" ? [player(`Play ${input.name}`, async () => input)] : [];
  return element("section", { className: `card tone-${input.i}`, ariaLabel: input.name },
    element("div", { className: "head" },
      ...(inputs.length > 1 ? [element("span", { className: "letter", ariaHidden: "true" }, letter)] : []),
      element("h2", {}, input.name), element("p", {}, what + spare),
      ...input.notes.map((note) => element("p", { className: "note" }, note))),
    element("div", { className: "tiles" },
      tile("large", element("div", { className: "frame" }, picture), "Input", ...heard),
      tile("large", element("div", { className: "frame" }, map, ...input.marks.toReversed()), "KL map"),
      ...input.slots.map(slotTile)));
}

function tile(size, frame, ...caption) {
  return element("div", { className: `tile ${size}` }, frame, element("p", {}, ...caption));
}

function slotTile(slot) {
  const nats = slot.empty ? "empty" : `${Math.round(slot.nats)} nats`;
  slot.canvas = element("canvas");
  paintSlot(slot);
  const label = `Slot ${nameOf(slot)} of ${slot.input.name}, ${nats}`;
  const className = `frame slot ${slot.empty ? "empty" : ""}`;
  slot.button = element("button", { className, ariaLabel: label, title: label },
    slot.canvas, element("span", { className: "tick", ariaHidden: "true" }, "✓"));
  slot.button.onclick = () => {
    slot.kept = !slot.kept;
    if (!slot.kept && chosen === slot) chosen = null;
    update();
  };
  const heard = kind === "sound" ? [player(`Play slot ${nameOf(slot)}`, () => hear(slot))] : [];
  slot.caption = element("span");
  return tile("", slot.button, element("b", {}, nameOf(slot)), slot.caption, ...heard);
}

/** Everything that says which slots are kept, and where they are. */
function place() {
  for (const slot of allSlots()) {
    const { kept, empty, input, k } = slot, [x, y] = position(slot);
    slot.button.ariaPressed = kept;
    slot.caption.textContent = caption(slot);
    const edge = spot(slot.cell)[0] > 0.85; // where the number stands to the left
    input.marks[k].className = `mark ${kept ? "kept" : ""} ${empty ? "empty" : ""} ${edge ? "edge" : ""}`;
    put(slot.handle, kind === "sound" ? [0.86 - 0.17 * ((k + 2 * input.i) % 5), y] : [x, y]);
    slot.handle.hidden = !kept;
    slot.handle.classList.toggle("chosen", slot === chosen);
    slot.handle.ariaLabel = handleLabel(slot);
    if (kind !== "sound") continue;
    slot.handle.textContent = `${nameOf(slot)}  ${noteName(slot)}`;
    slot.handle.ariaValueNow = slot.semitones;
    slot.handle.ariaValueText = `${interval(slot)}, ${noteName(slot)}`;
  }
  hint();
}

/** Where a slot is drawn or sung, in shares of the stage. */
function position(slot) {
  const [x, y] = spot(slot.cell);
  return kind === "sound" ? [x, y - slot.semitones / span()] : [x + slot.move[0], y + slot.move[1]];
}

const span = () => 12 * Math.log2(model.sample_rate / 2 / LOWEST); // semitones from the lowest to the highest
const signed = (number) => `${number > 0 ? "+" : ""}${number}`.replace("-", "−");
const interval = ({ semitones }) => `${signed(semitones)} semitone${Math.abs(semitones) === 1 ? "" : "s"}`;

function noteName(slot) {
  const key = Math.round((1 - position(slot)[1]) * span()), octave = 1 + Math.floor(key / 12); // above C1
  return ["C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B"].at(key % 12) + octave;
}

function caption(slot) {
  const nats = slot.empty ? "empty" : `${Math.round(slot.nats)} nats`;
  if (kind === "picture" || slot.empty) return nats;
  return `${noteName(slot)} · ${slot.semitones ? signed(slot.semitones) : nats}`;
}

function handleLabel(slot) {
  const [x, y] = position(slot).map((share) => Math.round(100 * share));
  if (kind === "sound") return `Pitch of slot ${nameOf(slot)}`;
  return `Slot ${nameOf(slot)}, ${x} % from the left, ${y} % from the top; arrow keys move it, F brings it in front`;
}

/** Below the stage: what can be done with the chosen slot, or how to choose one. */
function hint() {
  const what = { picture: "an object to another place", sound: "a note to another pitch, where it is sung anew" }[kind];
  $("how").textContent = `Drag ${what}, or use the arrow keys. Click a slot to take it in or out.`;
  $("how").hidden = Boolean(chosen);
  $("edit").hidden = !chosen;
  if (!chosen) return;
  $("which").textContent = `Slot ${nameOf(chosen)}`;
  $("where").textContent = kind === "sound" ? `${noteName(chosen)}, ${interval(chosen)}` : "";
  $("front").hidden = kind === "sound" || model.op !== "alpha"; // other layers have no order
  $("front").ariaPressed = chosen.front;
  $("back").disabled = !chosen.front && !chosen.semitones && !chosen.move.some(Boolean);
}

function draw(found) {
  result = found;
  if (kind === "picture") paintPixels($("picture"), found.pixels);
  else paintTile($("picture"), found.tile);
  const kept = allSlots().filter((slot) => slot.kept).map(nameOf).join(", ");
  $("picture").ariaLabel = `Recomposition of ${kept ? `slots ${kept}` : "no slots"}`;
  for (const { input, slot, alone, tile: spectrum } of found.moved ?? found.tiles) {
    const changed = Object.assign(inputs[input].slots[slot], alone ? { alone } : { tile: spectrum });
    paintSlot(changed);
  }
  if (playing?.button === $("play")) play(result, $("play"), context.currentTime - playing.started); // go on
}

// ---------------------------------------------------------------- Dragging

function handle(slot) {
  const sound = kind === "sound" ? { role: "slider", ariaOrientation: "vertical" } : {};
  slot.handle = element("button", { className: `handle tone-${slot.input.i}`, ...sound }, nameOf(slot));
  if (kind === "sound") [slot.handle.ariaValueMin, slot.handle.ariaValueMax] = limits(slot);
  slot.handle.onfocus = () => choose(slot);
  slot.handle.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's own
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key.toLowerCase() === "f" && kind === "picture") bringToFront(slot);
    if (!step) return;
    event.preventDefault();
    if (kind === "sound") sing(slot, slot.semitones + (step[0] - step[1]) * (event.shiftKey ? 12 : 1));
    else moveTo(slot, slot.move.map((share, axis) => share + step[axis] * (event.shiftKey ? 0.1 : 0.02)));
  };
  return slot.handle;
}

function choose(slot) {
  chosen = slot;
  place();
}

function bringToFront(slot) {
  slot.front = !slot.front;
  update();
}

/** Move a slot by these shares of the width, as far as its cell stays in the picture, or no farther outside. */
function moveTo(slot, move) {
  const from = spot(slot.cell), low = from.map((at) => Math.min(0, -at)), high = from.map((at) => Math.max(0, 1 - at));
  slot.move = move.map((share, axis) => Number(Math.min(high[axis], Math.max(low[axis], share)).toFixed(3)));
  update();
}

function limits(slot) {
  const height = (1 - spot(slot.cell)[1]) * span();
  return [Math.ceil(-height), Math.floor(span() - height)];
}

/** Transpose a slot; its sound is made once no key or pointer moved for a moment, because that takes a second. */
function sing(slot, semitones) {
  const [least, most] = limits(slot);
  slot.semitones = Math.min(most, Math.max(least, Math.round(semitones)));
  place();
  $("stage").classList.add("busy");
  clearTimeout(sing.later);
  sing.later = setTimeout(update, 250);
}

/** The slot seen at a place of the picture: of those that differ there from their background, the one most like it. */
function slotAt([x, y]) {
  const { size } = model, at = 3 * (Math.floor(y * size) * size + Math.floor(x * size));
  const apart = (a, b) => sum([0, 1, 2].map((c) => Math.abs(a[at + c] - b[at + c])));
  const seen = ({ kept, alone, input: { behind } }) => kept && behind && apart(alone, behind) > 40;
  const there = allSlots().filter(seen).map((slot) => [apart(slot.alone, result.pixels), slot]);
  return there.sort(([a], [b]) => a - b)[0]?.[1];
}

function dragStart(event) {
  const box = $("stage").getBoundingClientRect();
  const share = ({ clientX, clientY }) => [(clientX - box.left) / box.width, (clientY - box.top) / box.height];
  const from = share(event), held = allSlots().find((slot) => slot.handle === event.target);
  const slot = held ?? (kind === "picture" && event.pointerType !== "touch" && result ? slotAt(from) : null);
  if (!slot || event.button) return;
  event.preventDefault();
  slot.handle.focus({ preventScroll: true });
  const { move, semitones } = slot, stage = $("stage");
  stage.setPointerCapture(event.pointerId);
  stage.classList.add("grabbing");
  stage.onpointermove = (moved) => {
    const [x, y] = share(moved).map((place, axis) => place - from[axis]);
    if (kind === "sound") sing(slot, semitones - y * span());
    else moveTo(slot, [move[0] + x, move[1] + y]);
  };
  stage.onpointerup = stage.onpointercancel = () => {
    stage.onpointermove = stage.onpointerup = stage.onpointercancel = null;
    stage.classList.remove("grabbing");
  };
}

// ---------------------------------------------------------------- Hearing, and downloading

let context, playing; // of Web Audio; { source, button, started }

function player(label, sound) {
  const button = element("button", { className: "play", ariaLabel: label, title: label });
  button.onclick = async () => {
    if (playing?.button === button) return stop();
    try {
      play(await sound(), button);
    } catch (error) {
      complain(error.message);
    }
  };
  return button;
}

async function hear(slot) {
  return { rate: inputs[0].rate, ...(await ask("hear", slot.input.i, slot.k, slot.semitones)) };
}

function play({ channels, rate }, button, offset = 0) {
  stop();
  context ??= new AudioContext();
  context.resume();
  const buffer = context.createBuffer(channels.length, channels[0].length, rate), source = context.createBufferSource();
  channels.forEach((one, c) => buffer.copyToChannel(one, c));
  Object.assign(source, { buffer, onended: () => playing?.source === source && stop() }).connect(context.destination);
  source.start(0, offset);
  button.classList.add("playing");
  playing = { source, button, started: context.currentTime - offset };
  if (button === $("play")) follow(buffer.duration);
}

/** The line on the stage at what is heard. */
function follow(duration) {
  if (playing?.button !== $("play")) return;
  $("cursor").hidden = false;
  $("cursor").style.left = `${Math.min(100, (100 * (context.currentTime - playing.started)) / duration)}%`;
  requestAnimationFrame(() => follow(duration));
}

function stop() {
  if (!playing) return;
  const { source, button } = playing;
  playing = null;
  source.stop();
  button.classList.remove("playing");
  $("cursor").hidden = true;
}

/** A WAV file of 16 bits, softer where beyond full scale. */
function wav(channels, rate) {
  const n = channels[0].length, align = 2 * channels.length, view = new DataView(new ArrayBuffer(44 + n * align));
  const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  const peak = channels.reduce((top, one) => one.reduce((a, x) => Math.max(a, Math.abs(x)), top), 1);
  text(0, "RIFF");
  view.setUint32(4, 36 + n * align, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  [1, channels.length].forEach((value, i) => view.setUint16(20 + 2 * i, value, true));
  [rate, rate * align].forEach((value, i) => view.setUint32(24 + 4 * i, value, true));
  [align, 16].forEach((value, i) => view.setUint16(32 + 2 * i, value, true));
  text(36, "data");
  view.setUint32(40, n * align, true);
  channels.forEach((one, c) => one.forEach((x, i) => {
    view.setInt16(44 + i * align + 2 * c, Math.round((x / peak) * 32767), true);
  }));
  return new Blob([view], { type: "audio/wav" });
}

async function download() {
  await updating; // to have what was asked for last
  if (!result) return; // it failed, and was said
  const picture = () => new Promise((resolve) => $("picture").toBlob(resolve, "image/png"));
  const sound = kind === "sound", blob = sound ? wav(result.channels, result.rate) : await picture();
  const href = URL.createObjectURL(blob), name = `recomposed.${sound ? "wav" : "png"}`;
  element("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
  say(`Downloaded ${name}.`);
}

// ---------------------------------------------------------------- What the reader does

function openExample(sort) {
  open(() => Promise.all(EXAMPLES[sort].map(async (name) => {
    const url = modelOf(sort) + name, answer = await fetch(url).catch(() => ({}));
    const blob = answer.ok && (await answer.blob().catch(() => null)); // which may break off
    if (blob) return new File([blob], name);
    throw new Sentence(`${url} could not be fetched; serve the whole repository, with its models/.`);
  })));
}

/** What is being dragged over the page, as far as browsers tell before it is dropped. */
function kindOver(event) {
  const type = event.dataTransfer.items[0]?.type ?? "";
  return { image: "picture", audio: "sound" }[type.split("/")[0]];
}

function listen() {
  $("choose").onclick = () => $("files").click();
  $("files").onchange = () => {
    open([...$("files").files]);
    $("files").value = ""; // so that the same file may be chosen again
  };
  for (const button of document.querySelectorAll("[data-example]")) {
    const sort = button.dataset.example;
    button.onclick = () => openExample(sort);
    button.onpointerenter = () => ready(sort).catch(() => {}); // which a click would say
  }
  addEventListener("dragover", (event) => {
    event.preventDefault();
    const { classList } = document.body, sort = kindOver(event);
    if (sort && !classList.contains("dropping")) ready(sort).catch(() => {}); // which the drop would say
    classList.add("dropping");
  });
  addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    open([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => event.clipboardData.files.length && open([...event.clipboardData.files]));
  $("stage").onpointerdown = dragStart;
  $("play").onclick = () => (playing?.button === $("play") ? stop() : result && play(result, $("play")));
  $("download").onclick = download;
  $("front").onclick = () => bringToFront(chosen);
  $("back").onclick = () => {
    putBack(chosen);
    update();
  };
  $("reset").onclick = () => {
    chosen = null;
    inputs.forEach(prepare);
    update();
  };
}

listen();
say("");
start().catch((error) => complain(error.message)); // at once, so that the first drop need not wait
