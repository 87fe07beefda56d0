// Views of point clouds and meshes, shared by the pages of this project.
const LIMIT = Math.PI / 2;
const REACH = 0.9;                             // radius of the contents, at the centre, as a fraction of half a view's width

// ---------------------------------------------------------------- page
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter(child => child !== null));
  return node;
}
// A few significant digits, in plain notation if that is short.
const quantity = (x, digits = 3) => x !== 0 && (x >= 1e5 || x < 1e-3)
  ? x.toExponential(digits - 1).replace(/\.?0*e\+?/, "e") : x.toLocaleString("en", { maximumSignificantDigits: digits });
const count = n => n.toLocaleString("en");
const percent = x => quantity(100 * x, 3) + " %";
const time = s => s < 0.0095 ? (1000 * s).toFixed(1) + " ms" : s < 0.9995 ? Math.round(1000 * s) + " ms" : s.toFixed(2) + " s";
const plural = (n, one, many) => count(n) + " " + (n === 1 ? one : many);

function bytes(text) { return Uint8Array.from(atob(text), c => c.charCodeAt(0)); }
const shorts = text => new Uint16Array(bytes(text).buffer);
const longs = text => new Uint32Array(bytes(text).buffer);

// ---------------------------------------------------------------- drawing
// One WebGL context draws all views and is copied to their canvases, as browsers limit the contexts per page.
const stage = element("canvas", { width: 1, height: 1 });
const gl = stage.getContext("webgl2", { alpha: true, antialias: true });

const COMMON = `#version 300 es
precision highp float;
uniform mat3 turn; uniform vec3 centre; uniform vec2 zoom;
vec4 place(vec3 p, out float depth) {
  vec3 q = turn * (p - centre) / zoom.x;       // the unit ball, z towards the viewer
  depth = q.z;
  float w = 4.0 - q.z;                         // a viewer 4 radii away
  return vec4(q.xy * ${4 * REACH} * zoom.y, -0.1 * q.z * w, w);
}`;
const POINTS = [`${COMMON}
uniform float size; in vec3 position; in float lost; out float fog; out float gone;
void main() {
  float depth; gl_Position = place(position, depth);
  gl_PointSize = size * 4.0 / gl_Position.w; fog = clamp(0.5 - 0.5 * depth, 0.0, 1.0); gone = lost;
}`, `#version 300 es
precision highp float;
uniform vec3 ink, other, third, paper; in float fog; in float gone; out vec4 result;
void main() {
  float r = length(gl_PointCoord - 0.5);
  if (r > 0.5) discard;
  vec3 colour = gone > 1.5 ? third : gone > 0.5 ? other : ink;
  result = vec4(mix(colour, paper, 0.62 * fog), 1.0) * smoothstep(0.5, 0.4, r);
}`];
const MESH = [`${COMMON}
in vec3 position; in vec3 normal; in float warmth; out vec3 n; out float warm; out float fog;
void main() {
  float depth; gl_Position = place(position, depth);
  n = turn * normal; warm = warmth; fog = clamp(0.5 - 0.5 * depth, 0.0, 1.0);
}`, `#version 300 es
precision highp float;
uniform vec3 ink, other, paper; in vec3 n; in float warm; in float fog; out vec4 result;
void main() {
  vec3 m = normalize(n) * (gl_FrontFacing ? 1.0 : -1.0);
  float key = max(dot(m, normalize(vec3(-0.45, 0.6, 0.75))), 0.0), sky = 0.5 + 0.5 * m.y;
  float light = 0.34 + 0.16 * sky + 0.56 * key;
  float gleam = 0.10 * pow(max(dot(reflect(vec3(0, 0, -1), m), normalize(vec3(-0.45, 0.6, 0.75))), 0.0), 18.0);
  vec3 colour = mix(ink, other, warm) * light + gleam;
  result = vec4(mix(colour, paper, 0.22 * fog), 1.0);
}`];

function program([vertex, fragment]) {
  const made = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
  return made;
}
const programs = gl && { points: program(POINTS), mesh: program(MESH) };

function normals(vertices, faces) {
  const sum = new Float32Array(vertices.length);
  for (let f = 0; f < faces.length; f += 3) {
    const [a, b, c] = [3 * faces[f], 3 * faces[f + 1], 3 * faces[f + 2]];
    const ux = vertices[b] - vertices[a], uy = vertices[b + 1] - vertices[a + 1], uz = vertices[b + 2] - vertices[a + 2];
    const vx = vertices[c] - vertices[a], vy = vertices[c + 1] - vertices[a + 1], vz = vertices[c + 2] - vertices[a + 2];
    const n = [uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx];
    for (const i of [a, b, c]) for (let k = 0; k < 3; k++) sum[i + k] += n[k];
  }
  return sum;
}

// A body is the contents of a view: points, or a mesh with a warmth per vertex.
// `lost` is 0 for a kept point, 1 for one dropped as an outlier, 2 for one that the attack has added.
function pointBody(positions, lost, ink) {
  return { kind: "points", positions, lost, ink, other: "--dropped", third: "--anomaly", size: 0.0125 };
}
function meshBody(mesh, heat) {
  const positions = shorts(mesh.vertices), small = positions.length / 3 <= 65535;
  const faces = small ? Uint32Array.from(shorts(mesh.faces)) : longs(mesh.faces);
  return { kind: "mesh", positions, faces, heat, ink: "--surface", other: "--anomaly", size: 0.008 };
}
function upload(body) {
  const array = gl.createVertexArray(), made = programs[body.kind];
  gl.bindVertexArray(array);
  const attribute = (name, values, size, type, normalised) => {
    const slot = gl.getAttribLocation(made, name);
    if (slot < 0) return;
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(slot);
    gl.vertexAttribPointer(slot, size, type, normalised, 0, 0);
  };
  attribute("position", body.positions, 3, gl.UNSIGNED_SHORT, false);
  if (body.kind === "points") attribute("lost", body.lost, 1, gl.UNSIGNED_BYTE, false);
  else {
    attribute("normal", normals(body.positions, body.faces), 3, gl.FLOAT, false);
    attribute("warmth", body.heat, 1, gl.UNSIGNED_BYTE, true);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, body.faces, gl.STATIC_DRAW);
  }
  gl.bindVertexArray(null);
  return array;
}

function rotation(pose) {
  const [cy, sy, cp, sp] = [Math.cos(pose.yaw), Math.sin(pose.yaw), Math.cos(pose.pitch), Math.sin(pose.pitch)];
  const right = [cy, sy, 0], towards = [cp * sy, -cp * cy, sp], up = [-sp * sy, sp * cy, cp];
  const rows = [right, up, towards];
  return upAxis === "z" ? rows : rows.map(([x, y, z]) => [x, z, -y]);     // y up: (x, y, z) is shown as (x, -z, y)
}
function colour(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
  const full = hex.length === 3 ? [...hex].map(c => c + c).join("") : hex;
  return [0, 2, 4].map(i => parseInt(full.slice(i, i + 2), 16) / 255);
}

function draw(view) {
  const { canvas, body, model } = view, ratio = Math.min(window.devicePixelRatio || 1, 2);
  const size = Math.max(1, Math.round(canvas.clientWidth * ratio));
  if (canvas.width !== size || canvas.height !== size) canvas.width = canvas.height = size;
  const plane = canvas.getContext("2d");
  plane.clearRect(0, 0, size, size);
  showPose(view);
  const rows = rotation(model.pose);
  drawAxes(plane, rows, size, ratio);
  if (!body) return;
  if (!gl) return drawPlain(plane, body, model, rows, size);
  if (stage.width < size || stage.height < size) stage.width = stage.height = size;
  gl.viewport(0, 0, size, size);
  gl.clearColor(0, 0, 0, 0);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  gl.enable(gl.DEPTH_TEST);
  const made = programs[body.kind], uniform = name => gl.getUniformLocation(made, name);
  gl.useProgram(made);
  gl.uniformMatrix3fv(uniform("turn"), true, new Float32Array(rows.flat()));
  gl.uniform3fv(uniform("centre"), model.centre);
  gl.uniform2f(uniform("zoom"), model.radius, model.pose.zoom);
  gl.uniform3fv(uniform("ink"), colour(body.ink));
  gl.uniform3fv(uniform("other"), colour(body.other));
  if (body.third) gl.uniform3fv(uniform("third"), colour(body.third));
  gl.uniform3fv(uniform("paper"), colour("--well"));
  if (body.kind === "points") gl.uniform1f(uniform("size"), body.size * size * Math.sqrt(model.pose.zoom));
  body.array ??= upload(body);
  gl.bindVertexArray(body.array);
  if (body.kind === "points") gl.drawArrays(gl.POINTS, 0, body.positions.length / 3);
  else gl.drawElements(gl.TRIANGLES, body.faces.length, gl.UNSIGNED_INT, 0);
  plane.drawImage(stage, 0, stage.height - size, size, size, 0, 0, size, size);
}

// Scale bar of a round length in units of the cloud, at the depth of the view's centre.
function showPose({ canvas, model, scale }) {
  const { yaw, pitch, zoom } = model.pose, width = canvas.clientWidth;
  const pixels = 0.5 * width * REACH * zoom / (model.radius * model.step);
  const most = 0.3 * width / pixels, power = 10 ** Math.floor(Math.log10(most));
  const length = power * [5, 2, 1].find(k => k * power <= most);
  scale.firstChild.style.width = `${length * pixels}px`;
  scale.lastChild.textContent = quantity(length);
  Object.assign(canvas.dataset, { yaw: (yaw * 180 / Math.PI).toFixed(1), pitch: (pitch * 180 / Math.PI).toFixed(1), zoom: zoom.toFixed(3), up: upAxis });
}

// The axes of the cloud, in the lower right corner.
function drawAxes(plane, rows, size, ratio) {
  const length = 17 * ratio, [x, y] = [size - 2 * length, size - 2 * length];
  plane.font = `${10.5 * ratio}px ui-sans-serif, system-ui, sans-serif`;
  plane.textAlign = "center";
  plane.textBaseline = "middle";
  plane.lineWidth = 1.2 * ratio;
  const soft = getComputedStyle(document.documentElement).getPropertyValue("--soft");
  plane.strokeStyle = plane.fillStyle = soft;
  for (const axis of [0, 1, 2]) {
    const [right, up] = [rows[0][axis], rows[1][axis]];
    plane.globalAlpha = rows[2][axis] < -0.2 ? 0.45 : 1;
    plane.beginPath();
    plane.moveTo(x, y);
    plane.lineTo(x + length * right, y - length * up);
    plane.stroke();
    if (Math.hypot(right, up) > 0.25) plane.fillText("xyz"[axis], x + 1.5 * length * right, y - 1.5 * length * up);
  }
  plane.globalAlpha = 1;
}

// Without WebGL, views show points or the vertices of the mesh, drawn from back to front.
function drawPlain(plane, body, model, rows, size) {
  const total = body.positions.length / 3, seen = [];
  for (let i = 0; i < total; i++) {
    const p = [0, 1, 2].map(k => (body.positions[3 * i + k] - model.centre[k]) / model.radius);
    const [x, y, z] = rows.map(row => row[0] * p[0] + row[1] * p[1] + row[2] * p[2]);
    seen.push([z, x, y, body.kind === "mesh" ? Number(body.heat[i] > 127) : body.lost[i]]);
  }
  const inks = [body.ink, body.other, body.third ?? body.other].map(colour), paper = colour("--well"), scale = 0.5 * REACH * size * model.pose.zoom;
  for (const [z, x, y, marked] of seen.sort((a, b) => a[0] - b[0])) {
    const fog = 0.62 * Math.min(1, Math.max(0, 0.5 - 0.5 * z)), base = inks[marked];
    plane.fillStyle = `rgb(${base.map((c, k) => 255 * (c * (1 - fog) + paper[k] * fog)).join(" ")})`;
    plane.beginPath();
    plane.arc(size / 2 + scale * x, size / 2 - scale * y, 0.5 * body.size * size, 0, 7);
    plane.fill();
  }
}

// ---------------------------------------------------------------- synchronised views
const views = [], visible = new Set(), stale = new Set();
let upAxis = "z", frame = 0;
const watch = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    const view = views.find(({ canvas }) => canvas === target);
    if (isIntersecting) { visible.add(view); refresh([view]); } else visible.delete(view);
  }
}, { rootMargin: "200px" });

function refresh(which) {
  for (const view of which) stale.add(view);
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    for (const view of stale) if (visible.has(view)) { draw(view); stale.delete(view); }
  });
}
const HOME = { yaw: 0.6, pitch: 0.35, zoom: 1 };
const reset = model => { Object.assign(model.pose, HOME); refresh(model.views); };
function swapUp() {
  upAxis = upAxis === "z" ? "y" : "z";
  upright.textContent = `up axis: ${upAxis}`;
  refresh(views);
}
const upright = element("button", { title: "Swaps the axis that points up (U)" }, "up axis: z");
upright.addEventListener("click", swapUp);

function makeView(model, body, label) {
  const canvas = element("canvas", {
    tabindex: 0, width: 1, height: 1, role: "application", "aria-roledescription": "3D view", "aria-label": label,
    "aria-describedby": "help", "aria-keyshortcuts": "ArrowLeft ArrowRight ArrowUp ArrowDown + - 0 U",
  });
  const scale = element("div", { class: "scale", "aria-hidden": "true" }, element("i"), element("span"));
  const view = { canvas, body, model, scale, well: element("div", { class: "well" }, canvas, scale) };
  const turn = (yaw, pitch) => {
    model.pose.yaw -= yaw;
    model.pose.pitch = Math.max(-LIMIT, Math.min(LIMIT, model.pose.pitch + pitch));
    refresh(model.views);
  };
  const zoom = factor => { model.pose.zoom = Math.max(0.5, Math.min(8, model.pose.zoom * factor)); refresh(model.views); };
  const held = new Map();
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, [event.clientX, event.clientY]);
  });
  canvas.addEventListener("pointermove", event => {
    const last = held.get(event.pointerId);
    if (!last) return;
    const [x, y] = [event.clientX, event.clientY], step = 3.6 / canvas.clientWidth;
    if (held.size === 1) turn((x - last[0]) * step, (y - last[1]) * step);
    else {
      const other = [...held].find(([id]) => id !== event.pointerId)[1];
      const gap = ([a, b]) => Math.hypot(a - other[0], b - other[1]) || 1;
      zoom(gap([x, y]) / gap(last));
    }
    held.set(event.pointerId, [x, y]);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, event => held.delete(event.pointerId));
  canvas.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey) return;          // scroll the page as usual
    event.preventDefault();
    zoom(Math.exp(-0.002 * event.deltaY));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => reset(model));
  canvas.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;          // reserved for the browser
    const act = {
      ArrowLeft: () => turn(-0.12, 0), ArrowRight: () => turn(0.12, 0), ArrowUp: () => turn(0, -0.12),
      ArrowDown: () => turn(0, 0.12), "+": () => zoom(1.15), "=": () => zoom(1.15), "-": () => zoom(1 / 1.15), "_": () => zoom(1 / 1.15),
      "0": () => reset(model), Home: () => reset(model), u: swapUp, U: swapUp,
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  views.push(view);
  model.views.push(view);
  watch.observe(canvas);
  return view;
}

// ---------------------------------------------------------------- parts of pages
function definition(pairs, name) {
  return element("dl", { class: name }, ...pairs.map(([term, text]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, text))));
}

const key = (variable, text) => element("span", { class: "key", style: `--dot: var(${variable})` }, text);
const home = element("button", { title: "Turns every view back (0 for one)" }, "reset all views");
home.addEventListener("click", () => [...new Set(views.map(({ model }) => model))].forEach(reset));
const keys = (names, text) => element("span", {}, ...names.map(name => element("kbd", {}, name)), ` ${text}`);
const help = element("div", { class: "help", id: "help" }, element("span", {}, "Drag a view to turn it, Ctrl + wheel or pinch to zoom."),
    element("span", {}, "With the keyboard (Tab selects a view):"), keys(["←", "→", "↑", "↓"], "turn"), keys(["+", "−"], "zoom"),
    keys(["0"], "reset"), keys(["U"], "up axis"));
const figure = (view, ...caption) => element("figure", {}, view.well, element("figcaption", {}, ...caption));
const label = (name, text) => element("span", {}, element("b", {}, name), " ", text);
window.addEventListener("resize", () => refresh(views));
window.addEventListener("beforeprint", () => views.forEach(draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => refresh(views));
