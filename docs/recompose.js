/* recompose.py in JavaScript: takes pictures and sounds apart and puts slots together, in a worker of page.js.

   The arithmetic is that of ../recompose.py, under the same names; tests/test_page.py compares the two. Arrays are
   flat, the last axis fastest: pictures (H, W, 3) as uint8, what graphs take and give (B, ...) as float32, masks
   (N, F, T); only spectra are (T, F), because frames are transformed one by one. */
"use strict";

const ORT = {
  "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
  "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
};
// The smallest graph, y = x: opened once, it makes the browser compile what all graphs need, before one is asked for.
const IDENTITY = "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEBE=";
const LOWEST = 32.7; // Hz: the C1 at which the models' logarithmic frequency axis begins
const FADE = 0.02; // s over which a sung note fades in

class Sentence extends Error {} // says what is wrong and what was expected, for the reader of the page

// ---------------------------------------------------------------- The exported model, in onnxruntime-web

let ort; // a promise of the module; made once

/** Fetch onnxruntime-web's two files, refuse any but these very ones, and start it in this thread. */
async function startRuntime(folder) {
  const [code, wasm] = await Promise.all(Object.entries(ORT).map(async ([name, integrity]) => {
    const answer = await fetch(folder + name, { integrity }).catch(() => ({}));
    if (answer.ok) return answer.arrayBuffer();
    throw new Sentence(`onnxruntime-web could not be fetched from ${new URL(folder).host}, or is not version 1.30.0; `
      + "go online, or see docs/embedding.md for how to use a copy on this machine (?ort=PATH/).");
  }));
  try {
    const module = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
    Object.assign(module.env.wasm, { wasmBinary: wasm, numThreads: 1 });
    module.env.logLevel = "error";
    await module.InferenceSession.create(Uint8Array.from(atob(IDENTITY), (letter) => letter.charCodeAt(0)));
    return module;
  } catch {
    throw new Sentence("onnxruntime-web does not start here; a browser of 2023 or newer, with WebAssembly, is needed.");
  }
}

class Model {
  static opened = {}; // by folder

  static open(folder) {
    return (Model.opened[folder] ??= new Model(folder).read().catch((error) => {
      delete Model.opened[folder]; // so that another try fetches anew
      throw error;
    }));
  }

  constructor(folder) {
    Object.assign(this, { folder, sessions: {} });
  }

  async read() {
    this.about = JSON.parse(new TextDecoder().decode(await this.fetch("model.json")));
    await Promise.all(["encoder", "decoder", "composer"].map((graph) => this.session(graph)));
    return this;
  }

  async fetch(name) {
    const answer = await fetch(this.folder + name).catch(() => ({}));
    if (answer.ok) return answer.arrayBuffer();
    throw new Sentence(`${this.folder + name} could not be fetched; serve the whole repository, with its models/.`);
  }

  session(graph) {
    const create = async () => {
      const [module, bytes] = await Promise.all([ort, this.fetch(`${graph}.onnx`)]);
      return module.InferenceSession.create(new Uint8Array(bytes), { logSeverityLevel: 3 });
    };
    return (this.sessions[graph] ??= create().catch((error) => {
      delete this.sessions[graph];
      throw error;
    }));
  }

  /** Named [data, ...shape] -> named tensors; an error where one is not finite. */
  async run(graph, inputs) {
    const session = await this.session(graph), { Tensor } = await ort;
    const feeds = Object.entries(inputs).map(([name, [data, ...dims]]) => [name, new Tensor("float32", data, dims)]);
    const found = await session.run(Object.fromEntries(feeds));
    for (const { data } of Object.values(found)) {
      if (!data.every(Number.isFinite)) throw new Sentence(`${graph}.onnx gives values that are not finite.`);
    }
    return found;
  }

  async encode(input) {
    const found = await this.run("encoder", input);
    const [, n, depth] = found.mu.dims, [, rows, columns] = found.kl_map.dims;
    const slots = Array.from({ length: n }, (_, k) => ({
      z: found.mu.data.slice(k * depth, (k + 1) * depth),
      cell: [...found.cell.data.slice(2 * k, 2 * k + 2)],
      nats: found.kl.data[k],
    }));
    return { slots, map: { values: found.kl_map.data, rows, columns }, background: found.background?.data };
  }

  /** Slots with z and cell -> the layer of each, its shape in `this.layer`. */
  async decode(slots) {
    const z = concatenate(slots.map((slot) => slot.z)), cell = Float32Array.from(slots.flatMap((slot) => slot.cell));
    const n = slots.length, inputs = { z: [z, 1, n, z.length / n], cell: [cell, 1, n, 2] };
    const { layer: { data, dims } } = await this.run("decoder", inputs);
    this.layer = dims.slice(2);
    return slots.map((_, k) => data.subarray((k * data.length) / n, ((k + 1) * data.length) / n));
  }

  /** Layers, composed together, or each `alone` -> one image or spectrogram, or as many, one after the other. */
  async compose(layers, background, alone = false) {
    const shape = alone ? [layers.length, 1] : [1, layers.length], inputs = { layer: [concatenate(layers)] };
    inputs.layer.push(...shape, ...this.layer);
    if (background) {
      const all = Array(shape[0]).fill(background);
      inputs.background = [concatenate(all), shape[0], 3, this.about.size, this.about.size];
    }
    return Object.values(await this.run("composer", inputs))[0].data;
  }
}

function concatenate(arrays) {
  const all = new arrays[0].constructor(arrays.reduce((total, array) => total + array.length, 0));
  arrays.reduce((at, array) => (all.set(array, at), at + array.length), 0);
  return all;
}

/** Say so where the model leaves much of its input unexplained. */
function warnings(model, found, true_, what) {
  let error = 0, total = 0, squares = 0;
  for (let i = 0; i < found.length; i++) {
    error += (found[i] - true_[i]) ** 2;
    total += true_[i];
    squares += true_[i] ** 2;
  }
  const variance = squares / found.length - (total / found.length) ** 2;
  const unlike = error / found.length / Math.max(variance, 1e-9) > (model.about.unlike ?? Infinity);
  return unlike ? [`Unlike the ${what} that this model has learnt; expect nonsense.`] : [];
}

// ---------------------------------------------------------------- Pictures

/** Python's round: halves go to the even number. */
function round(x) {
  return x % 1 === 0.5 || x % 1 === -0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

/** The square of a picture that a model sees: [left, top, right, bottom], and what is to be said of it. */
function square(width, height, crop) {
  if (width === height) return [[0, 0, width, height]];
  const top = height / 2 + width / 64 - 0.3 * width;
  if (crop === "clevr" && top >= 0 && top + 0.6 * width <= height && width > 4) {
    return [[0.2 * width, top, 0.8 * width, top + 0.6 * width].map(round)];
  }
  const side = Math.min(width, height), [left, above] = [(width - side) / 2, (height - side) / 2].map(Math.ceil);
  const note = "Not of a shape for CLEVR's crop, so the largest square in the middle is used (recompose.py --crop centre).";
  return [[left, above, left + side, above + side], ...(crop === "clevr" ? [note] : [])];
}

/** PIL's BILINEAR from n to `size` pixels: a triangle as wide as the scale, where it shrinks, in 22 bits. */
function triangles(n, size) {
  const scale = n / size, support = Math.max(scale, 1);
  return Array.from({ length: size }, (_, i) => {
    const centre = (i + 0.5) * scale, first = Math.max(0, Math.trunc(centre - support + 0.5));
    const length = Math.min(n, Math.trunc(centre + support + 0.5)) - first;
    const weight = (_, x) => Math.max(0, 1 - Math.abs((x + first - centre + 0.5) / support));
    const weights = Float64Array.from({ length }, weight), total = weights.reduce((a, b) => a + b);
    return { first, weights: weights.map((w) => Math.round((w / total) * 2 ** 22)) };
  });
}

/** One pass of PIL's resize, rounded to uint8: `out` gets, at `at` + c, sums of `pixels` `step` apart, from `start`. */
function weigh(pixels, start, step, { first, weights }, out, at) {
  let r = 2 ** 21, g = r, b = r;
  for (let x = 0, i = start + first * step; x < weights.length; x++, i += step) {
    r += pixels[i] * weights[x];
    g += pixels[i + 1] * weights[x];
    b += pixels[i + 2] * weights[x];
  }
  out[at] = r >> 22;
  out[at + 1] = g >> 22;
  out[at + 2] = b >> 22;
}

/** A square of a bitmap, on white -> uint8 (size, size, 3), as PIL resizes; strips keep a large photo's memory low. */
function resize(bitmap, [left, top, right, bottom], size) {
  const width = right - left, height = bottom - top, strip = Math.min(height, 256);
  const canvas = new OffscreenCanvas(width, strip), context = canvas.getContext("2d", { willReadFrequently: true });
  const across = triangles(width, size), down = triangles(height, size);
  const narrow = new Uint8Array(height * size * 3), out = new Uint8Array(size * size * 3);
  context.fillStyle = "white";
  for (let y = 0; y < height; y += strip) {
    context.fillRect(0, 0, width, strip);
    context.drawImage(bitmap, -left, -top - y);
    const { data } = context.getImageData(0, 0, width, strip);
    for (let row = 0; row < Math.min(strip, height - y); row++) {
      across.forEach((sum, x) => weigh(data, 4 * row * width, 4, sum, narrow, 3 * ((y + row) * size + x)));
    }
  }
  down.forEach((sum, y) => {
    for (let x = 0; x < size; x++) weigh(narrow, 3 * x, 3 * size, sum, out, 3 * (y * size + x));
  });
  return out;
}

async function isAnimated(file) {
  const type = { 0x89504e47: "png", 0x47494638: "gif", 0x52494646: "webp" };
  const first = new DataView(await file.slice(0, 4).arrayBuffer());
  const form = first.byteLength === 4 && type[first.getUint32(0)];
  if (!form || typeof ImageDecoder === "undefined") return false; // the first frame is taken
  const decoder = new ImageDecoder({ data: file.stream(), type: `image/${form}` });
  try {
    await decoder.completed;
    return decoder.tracks.selectedTrack.frameCount > 1;
  } finally {
    decoder.close();
  }
}

async function loadPicture(file, size, crop) {
  let bitmap, animated;
  try {
    animated = await isAnimated(file);
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }); // upright, as its EXIF says
  } catch {
    throw new Sentence(`${file.name} is damaged, or no picture that this browser reads; expected a PNG or JPEG.`);
  }
  if (animated) throw new Sentence(`${file.name} is animated; expected a still picture.`);
  const [box, ...notes] = square(bitmap.width, bitmap.height, crop), pixels = resize(bitmap, box, size);
  bitmap.close();
  return { pixels, notes };
}

/** (H, W, 3) from 0 to 255 <-> (3, H, W) from 0 to 1. */
function toPlanes(pixels) {
  const n = pixels.length / 3, planes = new Float32Array(3 * n);
  for (let i = 0; i < n; i++) for (let c = 0; c < 3; c++) planes[c * n + i] = pixels[3 * i + c] / 255;
  return planes;
}

function toPixels(planes) {
  const n = planes.length / 3, pixels = new Uint8ClampedArray(3 * n); // which clips, and rounds halves to even
  for (let i = 0; i < n; i++) for (let c = 0; c < 3; c++) pixels[3 * i + c] = planes[c * n + i] * 255;
  return pixels;
}

async function openPicture(model, file) {
  const { size, crop } = model.about, { pixels, notes } = await loadPicture(file, size, crop);
  const image = toPlanes(pixels), input = await model.encode({ image: [image, 1, 3, size, size] });
  const layers = await model.decode(input.slots);
  const behind = input.background, alone = await model.compose(layers, behind, true);
  const unlike = warnings(model, await model.compose(layers, behind), image, "pictures");
  input.slots.forEach((slot, k) => {
    const one = toPixels(alone.subarray(3 * k * size ** 2, 3 * (k + 1) * size ** 2));
    Object.assign(slot, { layer: layers[k], alone: one, place: [0, 0] });
  });
  return { ...input, pixels, behind: behind && toPixels(behind), notes: [...notes, ...unlike] };
}

/** Kept slots [{ input, slot, move, front }] -> the picture they make, and each one alone that has moved since. */
async function recomposePictures(kept) {
  const { model, inputs } = opened(), layers = [], moved = [];
  for (const { input, slot, move, front } of kept) {
    const one = inputs[input].slots[slot];
    if (one.place.join() !== move.join()) {
      const cell = move.some(Boolean) ? [one.cell[0] + 2 * move[1], one.cell[1] + 2 * move[0]] : one.cell;
      [one.layer] = await model.decode([{ z: one.z, cell }]);
      one.alone = toPixels(await model.compose([one.layer], inputs[input].background));
      one.place = move;
      moved.push({ input, slot, alone: one.alone });
    }
    const layer = front ? one.layer.slice() : one.layer; // whose first channel is how near it is: others are at most 2
    if (front) for (let i = 0; i < model.about.size ** 2; i++) layer[i] += 10;
    layers.push(layer);
  }
  const { background, pixels } = inputs[0], nothing = background ?? new Float32Array(pixels.length);
  return { pixels: toPixels(layers.length ? await model.compose(layers, background) : nothing), moved };
}

// ---------------------------------------------------------------- Spectra

/** Discrete Fourier transforms of one size, in place: radix 2, and Bluestein's convolution for all other sizes. */
class Fourier {
  static made = new Map();

  static of(n) {
    if (!Fourier.made.has(n)) Fourier.made.set(n, new Fourier(n));
    return Fourier.made.get(n);
  }

  constructor(n) {
    const turn = (f, count, step) => Float64Array.from({ length: count }, (_, i) => f(step(i)));
    this.n = n;
    this.radix = (n & (n - 1)) === 0;
    const angle = this.radix ? (i) => (-2 * Math.PI * i) / n : (i) => (-Math.PI * ((i * i) % (2 * n))) / n;
    this.cos = turn(Math.cos, this.radix ? n / 2 : n, angle);
    this.sin = turn(Math.sin, this.radix ? n / 2 : n, angle);
    if (this.radix) return;
    this.inner = Fourier.of(2 ** Math.ceil(Math.log2(2 * n - 1)));
    const m = this.inner.n;
    [this.re, this.im, this.kernelRe, this.kernelIm] = Array.from({ length: 4 }, () => new Float64Array(m));
    for (let i = 0; i < n; i++) {
      this.kernelRe[i] = this.kernelRe[(m - i) % m] = this.cos[i];
      this.kernelIm[i] = this.kernelIm[(m - i) % m] = -this.sin[i];
    }
    this.inner.transform(this.kernelRe, this.kernelIm);
  }

  transform(re, im) {
    if (this.radix) this.radix2(re, im);
    else this.bluestein(re, im);
  }

  inverse(re, im) {
    this.transform(im, re); // conjugates before and after
    for (let i = 0; i < this.n; i++) {
      re[i] /= this.n;
      im[i] /= this.n;
    }
  }

  radix2(re, im) {
    const { n, cos, sin } = this;
    for (let i = 1, j = 0; i < n; i++) {
      let bit = n >> 1;
      for (; j & bit; bit >>= 1) j ^= bit;
      j ^= bit;
      if (i < j) {
        let swap = re[i];
        re[i] = re[j];
        re[j] = swap;
        swap = im[i];
        im[i] = im[j];
        im[j] = swap;
      }
    }
    for (let half = 1, step = n >> 1; half < n; half *= 2, step >>= 1) {
      for (let start = 0; start < n; start += 2 * half) {
        for (let k = 0, a = start, b = start + half; k < half; k++, a++, b++) {
          const c = cos[k * step], s = sin[k * step];
          const x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
          re[b] = re[a] - x;
          im[b] = im[a] - y;
          re[a] += x;
          im[a] += y;
        }
      }
    }
  }

  bluestein(re, im) {
    const { n, cos, sin, re: x, im: y, kernelRe, kernelIm } = this;
    x.fill(0);
    y.fill(0);
    for (let i = 0; i < n; i++) {
      x[i] = re[i] * cos[i] - im[i] * sin[i];
      y[i] = re[i] * sin[i] + im[i] * cos[i];
    }
    this.inner.transform(x, y);
    for (let i = 0; i < x.length; i++) {
      const real = x[i] * kernelRe[i] - y[i] * kernelIm[i];
      y[i] = x[i] * kernelIm[i] + y[i] * kernelRe[i];
      x[i] = real;
    }
    this.inner.inverse(x, y);
    for (let i = 0; i < n; i++) {
      re[i] = x[i] * cos[i] - y[i] * sin[i];
      im[i] = x[i] * sin[i] + y[i] * cos[i];
    }
  }
}

const hann = (n) => Float64Array.from({ length: n }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / n));

/** Samples, zero-padded to whole hops -> complex (T, F); frames are centred, the ends reflected. */
function stft(samples, nFft, hop) {
  const whole = Math.ceil(samples.length / hop) * hop, half = nFft / 2, bins = half + 1, frames = whole / hop + 1;
  const padded = new Float64Array(whole + nFft), window = hann(nFft), fourier = Fourier.of(nFft);
  padded.set(samples, half);
  for (let i = 1; i <= half; i++) {
    padded[half - i] = padded[half + i];
    padded[half + whole - 1 + i] = padded[half + whole - 1 - i];
  }
  const re = new Float64Array(nFft), im = new Float64Array(nFft);
  const spectrum = { frames, bins, re: new Float64Array(frames * bins), im: new Float64Array(frames * bins) };
  for (let t = 0; t < frames; t += 2) { // two real frames are one complex one
    for (let i = 0; i < nFft; i++) {
      re[i] = window[i] * padded[t * hop + i];
      im[i] = t + 1 < frames ? window[i] * padded[(t + 1) * hop + i] : 0;
    }
    fourier.transform(re, im);
    for (let f = 0, at = t * bins; f < bins; f++, at++) {
      const g = f && nFft - f;
      spectrum.re[at] = (re[f] + re[g]) / 2;
      spectrum.im[at] = (im[f] - im[g]) / 2;
      if (t + 1 === frames) continue;
      spectrum.re[at + bins] = (im[f] + im[g]) / 2;
      spectrum.im[at + bins] = (re[g] - re[f]) / 2;
    }
  }
  return spectrum;
}

/** A spectrum under a mask, both (T, F) -> n samples: the sound of the nearest STFT, in least squares. */
function inverseStft({ frames, bins, re, im }, mask, hop, n) {
  const nFft = 2 * (bins - 1), window = hann(nFft), fourier = Fourier.of(nFft);
  const waveform = new Float64Array((frames + 1) * hop + nFft), squares = new Float64Array(waveform.length);
  const x = new Float64Array(nFft), y = new Float64Array(nFft);
  for (let t = 0; t < frames; t += 2) {
    const both = t + 1 < frames;
    for (let f = 0, at = t * bins; f < bins; f++, at++) {
      const g = f && nFft - f, next = at + bins, a = mask[at] * re[at], b = mask[at] * im[at];
      const c = both ? mask[next] * re[next] : 0, d = both ? mask[next] * im[next] : 0;
      x[f] = a - d;
      y[f] = b + c;
      if (f === 0 || f === bins - 1) {
        x[f] = a; // the first and the last of a real sound's bins are real
        y[f] = c;
      } else {
        x[g] = a + d;
        y[g] = c - b;
      }
    }
    fourier.inverse(x, y);
    for (let i = 0, at = t * hop; i < nFft; i++, at++) {
      waveform[at] += window[i] * x[i];
      squares[at] += window[i] ** 2;
      if (!both) continue;
      waveform[at + hop] += window[i] * y[i];
      squares[at + hop] += window[i] ** 2;
    }
  }
  return Float32Array.from({ length: n }, (_, i) => waveform[i + nFft / 2] / Math.max(squares[i + nFft / 2], 1e-8));
}

/** A spectrum (T, F) -> magnitudes (F, T), of its first `frames`. */
function magnitudes({ frames, bins, re, im }) {
  const out = new Float64Array(frames * bins);
  for (let t = 0; t < frames; t++) {
    for (let f = 0; f < bins; f++) out[f * frames + t] = Math.hypot(re[t * bins + f], im[t * bins + f]);
  }
  return out;
}

/** Magnitudes of slots (N, F, T), of their mixture (F, T) -> the share of each in the power (Wiener 1949). */
function softMasks(magnitude, mixture, bins, frames) {
  const size = bins * frames, n = magnitude.length / size, power = Float64Array.from(magnitude, (m) => m * m + 1e-12);
  const total = new Float64Array(size), heard = new Float64Array(frames).fill(1e-12);
  const addUp = () => {
    total.fill(0);
    power.forEach((p, i) => (total[i % size] += p));
  };
  addUp();
  mixture.forEach((m, i) => m > 1e-9 && (heard[i % frames] = 1 + 1e-12)); // frames of zero-padding say nothing
  // Slots are smooth: each gets a gain for every bin first, by one step of NMF (Itakura-Saito, Févotte et al. 2009).
  for (let row = 0; row < n * bins; row++) {
    let above = 0, below = 0;
    for (let t = 0, i = row * frames, j = i % size; t < frames; t++, i++, j++) {
      const share = heard[t] * (power[i] / total[j]);
      above += share * (mixture[j] ** 2 / total[j] + 1e-12);
      below += share;
    }
    for (let t = 0, i = row * frames; t < frames; t++, i++) power[i] *= above / below;
  }
  addUp();
  return power.map((p, i) => p / total[i % size]);
}

/** The sum of some slots' masks (N, F, T) -> (T, F), for other bins, where the highest octave's mean goes on. */
function extend(masks, slots, from, to) {
  const out = new Float64Array(to.frames * to.bins), octave = Math.floor((from.bins + 1) / 2);
  for (let t = 0; t < to.frames; t++) {
    const row = t * to.bins, column = Math.min(t, from.frames - 1); // the last one goes on, too
    for (const k of slots) {
      const at = (f) => masks[(k * from.bins + f) * from.frames + column];
      let mean = 0;
      for (let f = from.bins - octave; f < from.bins; f++) mean += at(f) / octave;
      for (let f = 0; f < to.bins; f++) out[row + f] += f < from.bins ? at(f) : mean;
    }
  }
  return out;
}

/** STFT magnitudes (F, T), of their first frames -> (bands, frames): log(1 + 3 m) of bands of equal steps of pitch. */
function levels(magnitude, bins, frames, first) {
  const step = (i) => Math.trunc((bins / 256) * ((bins - 1) / (bins / 256)) ** (i / 48) + 1e-9);
  const edges = [...new Set(Array.from({ length: 49 }, (_, i) => step(i))), bins], out = [];
  for (let band = 0; band + 1 < edges.length; band++) {
    for (let t = 0; t < first; t++) {
      let sum = 0;
      for (let f = edges[band]; f < edges[band + 1]; f++) sum += magnitude[f * frames + t];
      out.push(sum / (edges[band + 1] - edges[band]));
    }
  }
  const loudness = Math.sqrt(out.reduce((sum, x) => sum + x * x, 0) / out.length);
  return out.map((x) => Math.log1p((3 * x) / Math.max(loudness, 1e-9)));
}

// ---------------------------------------------------------------- Sounds

const ZEROS = 90, CUTOFF = 0.9565, BETA = 12.6; // as steep as soxr's "HQ": 0.913 of the band passes, none beyond it

/** I0, by its series. */
function bessel(x) {
  let sum = 1, term = 1;
  for (let k = 1; term > 1e-17 * sum; k++) sum += term *= (x / (2 * k)) ** 2;
  return sum;
}

/** A sinc under a Kaiser window, x zero crossings of the band from its middle. */
function kernel(x) {
  if (Math.abs(x) >= ZEROS) return 0;
  const angle = Math.PI * CUTOFF * x, window = bessel(BETA * Math.sqrt(1 - (x / ZEROS) ** 2)) / bessel(BETA);
  return CUTOFF * window * (x ? Math.sin(angle) / angle : 1);
}

/** Samples at `rate` Hz -> at `wanted` Hz, as many as begun. */
function resample(samples, rate, wanted) {
  if (rate === wanted) return samples;
  const scale = Math.min(1, wanted / rate), half = Math.ceil(ZEROS / scale), weights = new Map();
  const padded = new Float32Array(samples.length + 2 * half + 1);
  padded.set(samples, half);
  const weigh = (phase) => Float64Array.from({ length: 2 * half }, (_, m) => {
    return scale * kernel((m + 1 - half - phase / wanted) * scale);
  });
  return Float32Array.from({ length: Math.ceil((samples.length * wanted) / rate) }, (_, i) => {
    const before = Math.floor((i * rate) / wanted), phase = i * rate - before * wanted; // which come again
    if (!weights.has(phase)) weights.set(phase, weigh(phase));
    const taps = weights.get(phase);
    let sum = 0;
    for (let m = 0, j = before + 1; m < taps.length; m++, j++) sum += taps[m] * padded[j];
    return sum;
  });
}

/** Samples -> n, cut off or zero-padded. */
function fit(samples, n) {
  const out = new Float32Array(n);
  out.set(samples.subarray(0, n));
  return out;
}

const mean = (channels) => channels[0].map((_, i) => channels.reduce((sum, one) => sum + one[i], 0) / channels.length);

/** Magnitudes (F, T) -> uint8 (rows, columns): dB of the 60 below `top`, from `highest` Hz down, in steps of pitch. */
function spectrumTile(magnitude, frames, columns, top, highest, rows = 128, nyquist = highest) {
  const bins = magnitude.length / frames, values = new Uint8Array(rows * columns);
  for (let y = 0; y < rows; y++) {
    const f = Math.round(((highest / nyquist) * (LOWEST / highest) ** (y / (rows - 1))) * (bins - 1));
    for (let x = 0; x < columns && f < bins; x++) {
      const level = 60 + 20 * Math.log10(Math.max(magnitude[f * frames + x] / Math.max(top, 1e-20), 1e-9));
      values[y * columns + x] = Math.round((255 / 60) * Math.min(60, Math.max(level, 0)));
    }
  }
  return { values, rows, columns };
}

const largest = (values) => values.reduce((top, value) => (value > top ? value : top), 0);

/** A sound { channels, rate, name } of at most the model's window, as the first one has them -> what is in it. */
async function openSound(model, sound, form) {
  const { sample_rate: own, samples: length, n_fft: nFft, hop: frame } = model.about;
  const { rate } = form, many = sound.channels.length !== form.channels.length;
  const channels = (many ? form.channels.map(() => mean(sound.channels)) : sound.channels)
    .map((one) => resample(one, sound.rate, rate));
  const n = channels[0].length, mono = resample(mean(channels), rate, own), waveform = fit(mono, length);
  const input = await model.encode({ waveform: [waveform, 1, length] }), layers = await model.decode(input.slots);
  const alone = await model.compose(layers, null, true), found = await model.compose(layers);
  const heard = stft(waveform, nFft, frame), { bins, frames } = heard, mixture = magnitudes(heard);
  const masks = softMasks(alone, mixture, bins, frames);
  const hop = Math.round((frame * rate) / own), longest = Math.round((length * rate) / own);
  const spectra = channels.map((one) => stft(fit(one, Math.max(n, longest)), 4 * hop, hop));
  const whole = Math.min(frames, Math.max(1, Math.round(mono.length / frame))); // frames that are not zero-padded
  const tile = (magnitude, top) => spectrumTile(magnitude, frames, whole, top, own / 2), top = largest(alone);
  input.slots.forEach((slot, k) => {
    const magnitude = alone.subarray(k * bins * frames, (k + 1) * bins * frames);
    Object.assign(slot, { tile: tile(magnitude, top), heard: {}, top });
  });
  const part = (slots) => spectra.map((one) => inverseStft(one, extend(masks, slots, heard, one), hop, n));
  const compared = [found, mixture].map((one) => levels(one, bins, frames, whole));
  const notes = warnings(model, ...compared, "notes");
  return { ...input, channels, rate, part, tile: tile(mixture, largest(mixture)), columns: whole, notes };
}

/** What slot k of an input sounds like, transposed by so many semitones: its mask's share, or decoded anew and sung. */
async function hear(i, k, semitones) {
  const { model, inputs } = opened(), input = inputs[i], slot = input.slots[k];
  slot.heard[0] ??= { channels: input.part([k]), tile: slot.tile };
  if (!semitones || slot.heard[semitones]) return slot.heard[semitones];
  const { sample_rate: own } = model.about, { rate, channels: [{ length: n }] } = input;
  const higher = semitones / 6 / Math.log2(own / 2 / LOWEST); // from -1 to 1 are all octaves
  const layers = await model.decode([{ z: slot.z, cell: [slot.cell[0] + higher, slot.cell[1]] }]);
  const spectrogram = await model.compose(layers), bins = model.about.n_fft / 2 + 1, frames = spectrogram.length / bins;
  const { waveform } = await model.run("vocoder", { spectrogram: [spectrogram, 1, bins, frames] });
  const ramp = (_, j) => Math.min((j + 0.5) / (FADE * rate), 1); // for Griffin-Lim begins with a click
  const sung = fit(resample(waveform.data, own, rate), n).map((x, j) => x * ramp(x, j));
  const power = (samples) => samples.reduce((sum, x) => sum + x * x, 0) / n, loudness = Math.max(power(sung), 1e-20);
  const channels = slot.heard[0].channels.map((part) => {
    const gain = Math.sqrt(power(part) / loudness);
    return sung.map((x) => x * gain);
  });
  const tile = spectrumTile(spectrogram, frames, input.columns, slot.top, own / 2);
  slot.heard = { 0: slot.heard[0], [semitones]: { channels, tile } };
  return slot.heard[semitones];
}

/** Kept slots [{ input, slot, semitones }] -> the sound they make, its spectrum, and what each looks like alone. */
async function recomposeSounds(kept) {
  const { model, inputs } = opened(), { sample_rate: own, n_fft: nFft } = model.about, { rate } = inputs[0];
  const n = Math.max(...inputs.map((input) => input.channels[0].length)), tiles = [];
  const channels = inputs[0].channels.map(() => new Float32Array(n));
  const add = (parts) => parts.forEach((part, c) => part.forEach((x, i) => (channels[c][i] += x)));
  for (const { input, slot, semitones } of kept) {
    if (semitones) add((await hear(input, slot, semitones)).channels);
    const { tile } = inputs[input].slots[slot].heard[semitones] ?? inputs[input].slots[slot];
    tiles.push({ input, slot, tile });
  }
  inputs.forEach((input, i) => { // those at their own pitch, at once
    const slots = kept.filter((one) => one.input === i && !one.semitones).map((one) => one.slot), name = slots.join();
    if (input.last?.name !== name) input.last = { name, parts: slots.length ? input.part(slots) : [] };
    add(input.last.parts);
  });
  // Of windows as long as the model's, but of a power of two, which is quick at any rate.
  const size = 2 ** Math.round(Math.log2((nFft * rate) / own)), hop = Math.round(rate / 64);
  const spectrum = stft(fit(mean(channels), Math.max(n, size)), size, hop), magnitude = magnitudes(spectrum);
  const columns = Math.max(1, Math.round(n / hop)), top = largest(magnitude);
  const tile = spectrumTile(magnitude, spectrum.frames, columns, top, own / 2, 256, rate / 2);
  return { channels, rate, tiles, tile };
}

// ---------------------------------------------------------------- What page.js asks for

let open = { inputs: [] }; // what is taken apart now

function opened() {
  if (!open.model) throw new Sentence("What was open is lost, as memory ran out, say; open it again.");
  return open;
}

const calls = {
  start(folder) {
    ort = startRuntime(folder);
    return ort.then(() => true);
  },

  /** The length in s of what a model hears at once, known before any sound is read. */
  async about(folder) {
    return (await Model.open(folder)).about;
  },

  async open(folder, files) {
    const model = await Model.open(folder), inputs = [], sounds = model.about.kind === "mvae-sound";
    for (const file of files) inputs.push(await (sounds ? openSound(model, file, files[0]) : openPicture(model, file)));
    open = { model, inputs };
    const shown = ({ alone, tile, cell, nats }) => ({ alone, tile, cell, nats });
    return inputs.map(({ slots, background, part, ...input }) => ({ ...input, slots: slots.map(shown) }));
  },

  recompose: (kept) => (opened().model.about.kind === "mvae-sound" ? recomposeSounds(kept) : recomposePictures(kept)),
  hear,
};

let queue = Promise.resolve(); // one after the other: onnxruntime runs one graph at a time
onmessage = ({ data: { id, call, args } }) => {
  queue = queue.then(() => calls[call](...args)).then(
    (value) => postMessage({ id, value }),
    (error) => postMessage({ id, error: error instanceof Sentence ? error.message : `This failed: ${error.message}` }),
  );
};
