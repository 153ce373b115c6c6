"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const colour = (name) => `var(--${name})`;
const number = (value) => (value === undefined || value === null ? "\u2013" : String(value));

/** An element with a class, text and children. */
function element(tag, { text, children = [], ...properties } = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** Videos of the same frames, which play, stop and step together. */
class Player {
  constructor(entry, onFrame) {
    Object.assign(this, { entry, onFrame, frame: 0, playing: false, seeking: false, speed: 1, turn: 0 });
    this.all = Object.entries(entry.videos).map(([name, source]) => this.open(name, source));
  }

  open(name, source) {
    const video = element("video", { src: source, muted: true, playsInline: true, preload: "auto" });
    video.dataset.name = name;
    const remember = (now, { mediaTime }) => {
      video.dataset.frame = Math.round(mediaTime * this.entry.fps);
      video.requestVideoFrameCallback?.(remember);
    };
    video.requestVideoFrameCallback?.(remember);
    const caption = element("figcaption", { className: "name", text: data.names[name] });
    caption.style.color = colour(name);
    $("videos").append(element("figure", { children: [video, caption] }));
    return video;
  }

  get videos() {
    return this.all.filter((video) => !video.parentElement.hidden);
  }

  get last() {
    return this.entry.n_frames - 1;
  }

  show(name, shown) {
    const video = this.all.find((video) => video.dataset.name === name);
    video.parentElement.hidden = !shown;
    if (!shown) video.pause();
    const resume = this.playing;
    this.pause();
    this.goTo(this.frame).then(() => resume && this.play());
  }

  /** Show a frame in all videos; of frames asked for in quick succession, the last one. */
  async goTo(frame) {
    this.at(Math.max(0, Math.min(this.last, frame)));
    if (this.seeking) return;
    this.seeking = true;
    for (let reached = -1; reached !== this.frame; ) {
      reached = this.frame;
      await Promise.all(this.videos.map((video) => seek(video, (reached + 0.5) / this.entry.fps)));
    }
    this.seeking = false;
  }

  at(frame) {
    this.frame = frame;
    this.onFrame(frame);
  }

  async play() {
    if (this.playing || !this.videos.length) return;
    const turn = ++this.turn; // a loop that was paused and has not noticed must not go on beside this one
    const goesOn = () => this.playing && turn === this.turn;
    this.playing = true;
    this.onFrame(this.frame);
    await this.goTo(this.frame >= this.last ? 0 : this.frame);
    if (goesOn()) await (this.speed ? this.run(goesOn) : this.step(goesOn));
  }

  pause() {
    this.playing = false;
    for (const video of this.all) video.pause();
    this.onFrame(this.frame);
  }

  /** Play all videos; the further one is ahead of the slowest, the slower it runs. */
  async run(goesOn) {
    const { fps, n_frames } = this.entry;
    const begin = () => this.videos.forEach((video) => video.play().catch(() => {}));
    begin();
    while (goesOn()) {
      const time = Math.min(...this.videos.map((video) => video.currentTime));
      this.at(Math.min(this.last, Math.floor(time * fps)));
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
  if (video.readyState < HTMLMediaElement.HAVE_METADATA) {
    await new Promise((resolve) => {
      video.addEventListener("loadedmetadata", resolve, { once: true });
      video.addEventListener("error", resolve, { once: true });
    });
  }
  if (video.error || Math.abs(video.currentTime - time) < 1e-6) return;
  const done = new Promise((resolve) => video.addEventListener("seeked", resolve, { once: true }));
  video.currentTime = time;
  await done;
}

/** A plot of one figure's curves, with a line at the player's frame; pointing at it moves the player. */
function plot(key, byName, nFrames) {
  const values = Object.values(byName).flat().filter((value) => value !== null);
  const { title, unit, better, meaning } = data.figures[key];
  const highest = Math.max(...values);
  const smallest = Math.min(...values);
  const lowest = smallest < highest / 4 ? Math.min(0, smallest) : smallest;
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title} by frame`);
  const x = (frame) => (100 * (frame + 0.5)) / nFrames;
  const y = (value) => 96 - (92 * (value - lowest)) / (highest - lowest || 1);
  const readings = {};
  const legend = element("div", { className: "values" });
  for (const [name, curve] of Object.entries(byName)) {
    const line = document.createElementNS(space, "polyline");
    const points = curve.flatMap((value, frame) => (value === null ? [] : [`${x(frame)},${y(value)}`]));
    line.setAttribute("points", points.join(" "));
    line.style.stroke = colour(name);
    svg.append(line);
    readings[name] = element("span", { className: "name" });
    readings[name].style.color = colour(name);
    legend.append(readings[name]);
  }
  const cursor = document.createElementNS(space, "line");
  cursor.setAttribute("y1", 0);
  cursor.setAttribute("y2", 100);
  svg.append(cursor);
  const point = (event) => {
    const { left, width } = svg.getBoundingClientRect();
    player.pause();
    player.goTo(Math.floor(((event.clientX - left) / width) * nFrames));
  };
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointermove", (event) => event.buttons && point(event));
  const about = [unit, `${better} is better`].filter(Boolean).join(", ");
  const range = element("p", { className: "range" });
  range.append(element("span", { text: `from ${number(lowest)} to ${number(highest)}` }));
  const caption = element("figcaption", {
    children: [element("b", { text: title }), ` (${about})`, legend],
  });
  const figure = element("figure", {
    children: [caption, svg, element("figcaption", { children: [range, element("p", { text: meaning })] })],
  });
  const update = (frame) => {
    cursor.setAttribute("x1", x(frame));
    cursor.setAttribute("x2", x(frame));
    for (const [name, curve] of Object.entries(byName)) {
      readings[name].textContent = `${data.names[name]} ${number(curve[frame])}`;
    }
  };
  return { figure, update };
}

/** A table's head and body; cells are text, and all but the first column numbers. */
function fill(table, head, rows) {
  const row = (tag, cells) =>
    element("tr", {
      children: cells.map((cell, index) => {
        const made = element(tag, { className: index ? "number" : "" });
        made.append(cell);
        return made;
      }),
    });
  table.replaceChildren(
    element("thead", { children: [row("th", head)] }),
    element("tbody", { children: rows.map((cells) => row("td", cells)) }),
  );
}

function named(key) {
  const { title, unit, better } = data.figures[key];
  const about = [unit, better].filter(Boolean).join(", ").replace("-", "\u2011"); // no line ends in 1e-3
  return element("span", { children: [`${title} `, element("small", { text: `(${about})` })] });
}

/** An option's value as a configuration file has it. */
function asYaml(value) {
  return typeof value === "string" && value ? value : JSON.stringify(value);
}

/** Rows of what the figures of all edits are compared with, as far as that is the same for all. */
function floors(keys, nSettings) {
  const rowOf = (name, entry) => keys.map((key) => number(entry.figures[key]?.[name]));
  return Object.keys(data.names)
    .filter((name) => name !== "edit" && data.entries.every((entry) => name in entry.videos))
    .filter((name) => new Set(data.entries.map((entry) => rowOf(name, entry).join())).size === 1)
    .map((name) => [data.names[name], ...Array(nSettings).fill(""), ...rowOf(name, data.entries[0])]);
}

/** The name or a value of an option, which may be a whole prompt. */
function setting(text) {
  return element("span", { text, className: text.length > 20 ? "setting long" : "setting" });
}

let player;
let plots = [];

/** Show one of the edits. */
function open(index) {
  player?.pause();
  const entry = data.entries[index];
  for (const [i, button] of buttons().entries()) button.setAttribute("aria-current", i === index);
  const said = [data.entries.length > 1 && entry.name, entry.prompt && `\u201c${entry.prompt}\u201d`];
  $("prompt").textContent = said.filter(Boolean).join(": ");
  $("verdict").replaceChildren(
    ...entry.findings.map(({ level, text, advice }) => {
      const say = [element("b", { text: level }), " ", element("span", { text })];
      if (advice) say.push(" ", element("span", { text: `To do: ${advice}.` }));
      return element("li", { className: level, children: say });
    }),
  );

  const curves = Object.keys(data.figures).filter((key) => entry.curves[key]);
  plots = curves.map((key) => plot(key, entry.curves[key], entry.n_frames));
  $("curves").replaceChildren(...plots.map(({ figure }) => figure));
  const names = Object.keys(data.names).filter((name) => curves.some((key) => name in entry.curves[key]));
  const rows = curves.map((key) => [
    named(key),
    ...names.map((name) => number(entry.figures[key]?.[name])),
  ]);
  fill($("figures"), ["mean over frames", ...names.map((name) => data.names[name])], rows);
  $("skipped").replaceChildren(
    ...entry.skipped.map((text) => element("li", { text: `not measured: ${text}` })),
  );
  $("sheet").src = entry.sheet;
  $("options").replaceChildren(
    ...Object.entries(entry.options).map(([key, value]) =>
      element("tr", { children: [element("td", { text: key }), element("td", { text: asYaml(value) })] }),
    ),
  );

  $("slider").max = entry.n_frames - 1;
  $("videos").replaceChildren();
  player = new Player(entry, (frame) => {
    $("slider").value = frame;
    $("frame").textContent = `${frame} / ${entry.n_frames - 1}`;
    $("play").textContent = player?.playing ? "Pause" : "Play";
    for (const { update } of plots) update(frame);
  });
  player.speed = Number($("speed").value);
  const first = Object.keys(entry.videos)[0];
  const last = Object.keys(entry.videos).at(-1);
  $("shown").replaceChildren(
    ...player.all.map(({ dataset: { name } }) => {
      const box = element("input", { type: "checkbox", checked: name === first || name === last });
      box.addEventListener("change", () => player.show(name, box.checked));
      if (!box.checked) player.show(name, false);
      return element("label", { children: [box, ` ${data.names[name]}`] });
    }),
  );
  player.goTo(0);
}

function start() {
  document.title = data.title;
  $("title").textContent = data.title;
  if (data.entries.length > 1) {
    // Settings, of which each edit has the same ones, name the edits if they tell all of them apart.
    const settings = Object.keys(data.entries[0].settings);
    const labels = data.entries.map((entry) => settings.map((name) => entry.settings[name]).join(", "));
    const apart = new Set(labels).size === labels.length;
    if (apart) $("entries").append(element("span", { text: `${settings.join(", ")}:` }));
    $("entries").append(
      ...data.entries.map((entry, index) => {
        const text = apart ? labels[index] : entry.name;
        const button = element("button", { type: "button", text, title: entry.name });
        button.addEventListener("click", () => {
          open(index);
          $("prompt").style.scrollMarginTop = `${$("entries").offsetHeight}px`;
          $("prompt").scrollIntoView();
        });
        return button;
      }),
    );
    const keys = Object.keys(data.figures).filter((key) => data.entries.some((e) => "edit" in (e.figures[key] ?? {})));
    const rows = data.entries.map((entry) => [
      element("span", { text: entry.name, title: entry.prompt ?? "" }),
      ...settings.map((name) => setting(entry.settings[name])),
      ...keys.map((key) => number(entry.figures[key]?.edit)),
    ]);
    const head = ["edit", ...settings.map(setting), ...keys.map(named)];
    fill($("overview").querySelector("table"), head, [...floors(keys, settings.length), ...rows]);
    $("overview").querySelector("img").src = data.sheet;
    $("entries").hidden = $("overview").hidden = false;
  }
  $("play").addEventListener("click", () => (player.playing ? player.pause() : player.play()));
  const step = (frames) => {
    player.pause();
    player.goTo(player.frame + frames);
  };
  $("back").addEventListener("click", () => step(-1));
  $("forward").addEventListener("click", () => step(1));
  $("slider").addEventListener("input", () => {
    player.pause();
    player.goTo(Number($("slider").value));
  });
  $("speed").addEventListener("change", () => {
    const resume = player.playing;
    player.pause();
    player.speed = Number($("speed").value);
    if (resume) requestAnimationFrame(() => player.play());
  });
  $("sheet").addEventListener("click", (event) => {
    const { moments } = data.entries[buttons().findIndex(isCurrent)] ?? data.entries[0];
    player.pause();
    player.goTo(moments[Math.floor((event.offsetX / $("sheet").clientWidth) * moments.length)]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT") return;
    const keys = {
      " ": () => (player.playing ? player.pause() : player.play()),
      ArrowLeft: () => step(-1),
      ArrowRight: () => step(1),
      Home: () => step(-player.frame),
      End: () => step(player.last),
    };
    if (!keys[event.key]) return;
    // A button or box that has the focus takes the space itself.
    if (event.key === " " && ["BUTTON", "INPUT"].includes(event.target.tagName) && event.target.type !== "range") return;
    event.preventDefault();
    keys[event.key]();
  });
  open(0);
}

const buttons = () => [...$("entries").querySelectorAll("button")];
const isCurrent = (button) => button.getAttribute("aria-current") === "true";
start();
