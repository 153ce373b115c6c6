"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const format = (value) => String(value ?? "\u2013");
const colour = (name) => `color: var(--${name}); stroke: var(--${name})`;
let player;
let plots = [];

/** How metrics are shown: title, unit, which values are better, and what they mean. */
const METRICS = {
  warp_1: ["warp error, gap 1", "x 1e-3", "lower", "Change from the frame before, squared, along the source's motion."],
  warp_4: ["warp error, gap 4", "x 1e-3", "lower", "The same, from 4 frames before. Blurred videos have little."],
  warp_8: ["warp error, gap 8", "x 1e-3", "lower", "The same, from 8 frames before. Blurred videos have little."],
  sharpness: ["sharpness", "of the source's", "near 1", "Squared gradient. Blur lowers it, and noise raises it."],
  drift: ["colour drift", "grey levels", "lower", "From the first second to the last. Motion changes colours, too."],
  flicker: ["flicker of still regions", "grey levels", "lower", "Change from the frame before where the source is still."],
  clip_prompt: ["CLIP score", "x 0.01", "higher", "Similarity of the frame and the prompt."],
  clip_frames: ["temporal consistency", "x 0.01", "higher", "CLIP similarity of the frame and the one before."],
  structure: ["structure distance", "x 1e-3", "lower", "Distance of the layout from the source's (DINO)."],
  psnr: ["PSNR", "dB", "higher", "Of the frame against the source's, over all pixels."],
  ssim: ["SSIM", "", "higher", "Of the frame against the source's, over all pixels."],
  lpips: ["LPIPS", "", "lower", "Perceptual distance of the frame from the source's."],
};

/** An element with these properties and children, which are elements or text. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** What a video is, in its colour, and perhaps more text. */
function labelled(tag, name, text = "") {
  return element(tag, { className: "name", style: colour(name) }, data.names[name] + text);
}

/** An element of a plot. */
function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Videos of the same frames, which play, stop and step together. */
class Player {
  constructor(entry, onFrame) {
    Object.assign(this, { entry, onFrame, frame: 0, last: entry.n_frames - 1 });
    Object.assign(this, { playing: false, seeking: false, turn: 0, speed: Number($("speed").value) });
    this.all = Object.entries(entry.videos).map(([name, source]) => this.open(name, source));
  }

  open(name, source) {
    const video = element("video", { src: source, muted: true, playsInline: true, preload: "auto" });
    const remember = (now, { mediaTime }) => {
      video.dataset.frame = Math.round(mediaTime * this.entry.fps);
      video.requestVideoFrameCallback(remember);
    };
    video.requestVideoFrameCallback?.(remember);
    $("videos").append(element("figure", {}, video, labelled("figcaption", name)));
    return video;
  }

  get videos() {
    return this.all.filter((video) => !video.parentElement.hidden);
  }

  async show(video, shown) {
    const resume = this.playing;
    this.pause();
    video.parentElement.hidden = !shown;
    await this.goTo(this.frame);
    if (resume) this.play();
  }

  /** Show a frame in all videos; of frames asked for in quick succession, the last one. */
  async goTo(frame) {
    this.at(frame);
    if (this.seeking) return;
    this.seeking = true;
    for (let reached = -1; reached !== this.frame; ) {
      reached = this.frame;
      await Promise.all(this.videos.map((video) => seek(video, (reached + 0.5) / this.entry.fps)));
    }
    this.seeking = false;
  }

  at(frame) {
    this.frame = Math.max(0, Math.min(this.last, frame));
    this.onFrame(this.frame, this.playing);
  }

  /** Stop, and show a frame. */
  stopAt(frame) {
    this.pause();
    this.goTo(frame);
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  async play() {
    if (this.playing || !this.videos.length) return;
    const turn = ++this.turn; // a loop that was paused and has not noticed must not go on beside this one
    const goesOn = () => this.playing && turn === this.turn;
    this.playing = true;
    await this.goTo(this.frame >= this.last ? 0 : this.frame);
    if (goesOn()) await (this.speed ? this.run(goesOn) : this.step(goesOn));
  }

  pause() {
    this.playing = false;
    for (const video of this.all) video.pause();
    this.at(this.frame);
  }

  /** Play all videos; the further one is ahead of the slowest, the slower it runs. */
  async run(goesOn) {
    const { fps, n_frames } = this.entry;
    const begin = () => this.videos.forEach((video) => video.play().catch(() => {}));
    begin();
    while (goesOn()) {
      const time = Math.min(...this.videos.map((video) => video.currentTime));
      this.at(Math.floor(time * fps));
      for (const video of this.videos) {
        const ahead = (video.currentTime - time) * fps; // frames
        // No stronger: on a busy machine this comes late, and would overshoot.
        video.playbackRate = this.speed * Math.max(0, 1 - ahead / 4);
      }
      if (time * fps >= n_frames || this.videos.some((video) => video.ended)) {
        for (const video of this.videos) video.pause();
        await this.goTo(0);
        if (goesOn()) begin();
      }
      await new Promise(requestAnimationFrame);
    }
  }

  /** Show frame after frame, slowly. */
  async step(goesOn) {
    while (goesOn()) {
      await new Promise((resolve) => setTimeout(resolve, 400));
      if (goesOn()) await this.goTo(this.frame >= this.last ? 0 : this.frame + 1);
    }
  }
}

/** Move a video to a time (seconds), and wait until it is there. */
async function seek(video, time) {
  const happens = (event) => new Promise((resolve) => video.addEventListener(event, resolve, { once: true }));
  if (video.readyState < HTMLMediaElement.HAVE_METADATA) {
    await Promise.race([happens("loadedmetadata"), happens("error")]);
  }
  if (video.error || Math.abs(video.currentTime - time) < 1e-6) return;
  const done = happens("seeked");
  video.currentTime = time;
  await done;
}

/** A plot of one metric's curves, with a line at the player's frame; pointing at it moves the player. */
function plot(key, curves, nFrames) {
  const values = curves.flatMap(([, curve]) => curve.filter((value) => value !== null)).sort((a, b) => a - b);
  const [title, unit, better, meaning] = METRICS[key];
  const [smallest, highest] = [values[0], values.at(-1)];
  const lowest = smallest < highest / 4 ? Math.min(0, smallest) : smallest;
  const x = (frame) => (100 * (frame + 0.5)) / nFrames;
  const y = (value) => 96 - (92 * (value - lowest)) / (highest - lowest || 1);
  const svg = shape("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": title });
  for (const [name, curve] of curves) {
    const points = curve.flatMap((value, frame) => (value === null ? [] : [`${x(frame)},${y(value)}`]));
    svg.append(shape("polyline", { points: points.join(" "), style: colour(name) }));
  }
  const cursor = svg.appendChild(shape("line", { y1: 0, y2: 100 }));
  const point = (event) => {
    const { left, width } = svg.getBoundingClientRect();
    player.stopAt(Math.floor(((event.clientX - left) / width) * nFrames));
  };
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointermove", (event) => event.buttons && point(event));
  const about = [unit, `${better} is better`].filter(Boolean).join(", ");
  const readings = element("div", { className: "values" });
  const head = element("figcaption", {}, element("b", {}, title), ` (${about})`, readings);
  const range = element("p", {}, `from ${format(lowest)} to ${format(highest)}`);
  const figure = element("figure", {}, head, svg, element("figcaption", {}, range, element("p", {}, meaning)));
  const update = (frame) => {
    cursor.setAttribute("x1", x(frame));
    cursor.setAttribute("x2", x(frame));
    const reading = ([name, curve]) => labelled("span", name, ` ${format(curve[frame])}`);
    readings.replaceChildren(...curves.map(reading));
  };
  return { figure, update };
}

/** A table's head and body; cells are text or elements, and all but the first column numbers. */
function fill(table, head, rows) {
  const row = (tag, cells) =>
    element("tr", {}, ...cells.map((cell, index) => element(tag, { className: index ? "number" : "" }, cell)));
  const body = rows.map((cells) => row("td", cells));
  table.replaceChildren(element("thead", {}, row("th", head)), element("tbody", {}, ...body));
}

/** A metric's title, with its unit and which values are better. */
function titled(key) {
  const [title, unit, better] = METRICS[key];
  const about = [unit, better].filter(Boolean).join(", ").replace("-", "\u2011"); // no line ends in 1e-3
  return element("span", {}, `${title} `, element("small", {}, `(${about})`));
}

/** The name or a value of an option, which may be a whole prompt. */
function setting(text) {
  return element("span", { className: text.length > 20 ? "setting long" : "setting" }, text);
}

/** Show one of the edits. */
function open(index) {
  player?.pause();
  const entry = data.entries[index];
  [...$("entries").querySelectorAll("button")].forEach((button, i) => button.setAttribute("aria-current", i === index));
  const said = [data.entries.length > 1 && entry.name, entry.prompt && `\u201c${entry.prompt}\u201d`];
  $("prompt").textContent = said.filter(Boolean).join(": ");
  const finding = ({ level, text, advice }) =>
    element("li", { className: level }, element("b", {}, level), " ", element("span", {}, `${text} ${advice}`));
  $("verdict").replaceChildren(...entry.findings.map(finding));

  const keys = Object.keys(METRICS).filter((key) => entry.curves[key]);
  plots = keys.map((key) => plot(key, Object.entries(entry.curves[key]), entry.n_frames));
  $("curves").replaceChildren(...plots.map(({ figure }) => figure));
  const names = Object.keys(data.names).filter((name) => keys.some((key) => name in entry.curves[key]));
  const rows = keys.map((key) => [titled(key), ...names.map((name) => format(entry.figures[key]?.[name]))]);
  fill($("metrics"), ["mean over frames", ...names.map((name) => data.names[name])], rows);
  $("skipped").replaceChildren(...entry.skipped.map((text) => element("li", {}, `not measured: ${text}`)));
  $("sheet").src = entry.sheet;
  // Values as a configuration file has them.
  const asYaml = (value) => (typeof value === "string" && value ? value : JSON.stringify(value));
  const options = Object.entries(entry.options).map(([key, value]) =>
    element("tr", {}, element("td", {}, key), element("td", {}, asYaml(value))),
  );
  $("options").replaceChildren(...options);

  $("slider").max = entry.n_frames - 1;
  $("videos").replaceChildren();
  player = new Player(entry, (frame, playing) => {
    $("slider").value = frame;
    $("frame").textContent = `${frame} / ${entry.n_frames - 1}`;
    $("play").textContent = playing ? "Pause" : "Play";
    for (const { update } of plots) update(frame);
  });
  const boxes = Object.keys(entry.videos).map((name, i) => {
    const video = player.all[i];
    const checked = i === 0 || i === player.all.length - 1;
    video.parentElement.hidden = !checked;
    const box = element("input", { type: "checkbox", checked });
    box.addEventListener("change", () => player.show(video, box.checked));
    return element("label", {}, box, ` ${data.names[name]}`);
  });
  $("shown").replaceChildren(...boxes);
  $("sheet").onclick = ({ offsetX }) =>
    player.stopAt(entry.moments[Math.floor((offsetX / $("sheet").clientWidth) * entry.moments.length)]);
  player.goTo(0);
}

/** A button for each edit, and a table of all below what they are compared with. */
function listEdits() {
  // Settings, of which each edit has the same ones, name the edits if they tell all of them apart.
  const settings = Object.keys(data.entries[0].settings);
  const labels = data.entries.map((entry) => settings.map((name) => entry.settings[name]).join(", "));
  const apart = new Set(labels).size === labels.length;
  if (apart) $("entries").append(element("span", {}, `${settings.join(", ")}:`));
  data.entries.forEach(({ name }, index) => {
    const button = element("button", { type: "button", title: name }, apart ? labels[index] : name);
    button.addEventListener("click", () => {
      open(index);
      $("prompt").style.scrollMarginTop = `${$("entries").offsetHeight}px`;
      $("prompt").scrollIntoView();
    });
    $("entries").append(button);
  });

  const keys = Object.keys(METRICS).filter((key) => data.entries.some(({ figures }) => figures[key]?.edit !== undefined));
  const means = (entry, name) => keys.map((key) => format(entry.figures[key]?.[name]));
  const [first] = data.entries;
  // What all edits are compared with, as far as that is the same for all.
  const same = Object.keys(data.names).filter((name) => {
    const rows = data.entries.map((entry) => name in entry.videos && means(entry, name).join());
    return name !== "edit" && name in first.videos && new Set(rows).size === 1;
  });
  const rows = data.entries.map((entry) => [
    element("span", { title: entry.prompt ?? "" }, entry.name),
    ...settings.map((name) => setting(entry.settings[name])),
    ...means(entry, "edit"),
  ]);
  const floors = same.map((name) => [data.names[name], ...settings.map(() => ""), ...means(first, name)]);
  fill($("overview").querySelector("table"), ["edit", ...settings.map(setting), ...keys.map(titled)], [...floors, ...rows]);
  $("overview").querySelector("img").src = data.sheet;
  $("entries").hidden = $("overview").hidden = false;
}

function press(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.altKey || event.metaKey || target.tagName === "SELECT") return;
  // A button or box that has the focus takes the space itself.
  if (key === " " && ["BUTTON", "INPUT"].includes(target.tagName) && target.type !== "range") return;
  const { frame, last } = player;
  const frames = { ArrowLeft: frame - 1, ArrowRight: frame + 1, Home: 0, End: last };
  if (key === " ") player.toggle();
  else if (key in frames) player.stopAt(frames[key]);
  else return;
  event.preventDefault();
}

document.title = $("title").textContent = data.title;
if (data.entries.length > 1) listEdits();
$("play").addEventListener("click", () => player.toggle());
$("back").addEventListener("click", () => player.stopAt(player.frame - 1));
$("forward").addEventListener("click", () => player.stopAt(player.frame + 1));
$("slider").addEventListener("input", () => player.stopAt(Number($("slider").value)));
$("speed").addEventListener("change", () => {
  const resume = player.playing;
  player.pause();
  player.speed = Number($("speed").value);
  if (resume) requestAnimationFrame(() => player.play());
});
document.addEventListener("keydown", press);
open(0);
