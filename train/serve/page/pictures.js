// Pictures: from a drop, the clipboard or a file to a data URI with the file's own bytes; and drawn, with boxes on them.

import { say } from "./texts.js";

const KINDS = /^image\/|^$/; // a system that does not know a kind (.ppm) gives none

export function part(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

// { name, uri } of each file; `refuse` is told the names of those that are none.
export async function readPictures(files, refuse) {
  const read = await Promise.all([...files].map((file) => readPicture(file)));
  read.forEach((picture, index) => picture ?? refuse(files[index].name));
  return read.filter(Boolean);
}

function readPicture(file) {
  if (!KINDS.test(file.type)) return null;
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name || say("picture"), uri: reader.result });
    reader.onerror = () => resolve(null); // a folder, or a file that went away
    reader.readAsDataURL(file);
  });
}

// A picture, as a button where it can be enlarged. `boxes` are { label, colour, box: [x1, y1, x2, y2] } in pixels of the picture as the
// model saw it: not turned by its EXIF data, unless `turned`.
export function drawPicture({ name, uri }, { boxes = [], turned = false, enlarge }) {
  const image = part("img", turned ? "turned" : "");
  image.alt = name;
  const canvas = part(enlarge ? "button" : "div", "canvas", image);
  if (enlarge) {
    canvas.type = "button";
    canvas.setAttribute("aria-label", say("enlarge", { name }));
    canvas.addEventListener("click", () => enlarge(drawPicture({ name, uri }, { boxes, turned })));
  }
  image.addEventListener("load", () => canvas.append(...drawBoxes(boxes, image.naturalWidth, image.naturalHeight)));
  image.addEventListener("error", () => image.replaceWith(part("span", "blind", say("unseen", { name }))));
  // After it is in the document: the size of a picture whose style is not known yet is that of the turned one.
  requestAnimationFrame(() => (image.src = uri));
  return canvas;
}

function drawBoxes(boxes, width, height) {
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const labels = boxes.map(({ label, colour, box: [x1, y1, x2, y2] }) => {
    const place = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
    svg.append(shape("rect", { class: "halo", ...place }), shape("rect", { class: colour, ...place }));
    const tag = part("span", `tag ${colour}`, label);
    tag.style.left = `${(100 * x1) / width}%`;
    tag.style.top = `${(100 * y1) / height}%`;
    tag.classList.toggle("inside", y1 < 0.1 * height);
    return tag;
  });
  return boxes.length ? [svg, ...labels] : [];
}

function shape(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
