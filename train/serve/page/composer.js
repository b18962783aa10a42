// The next question: its pictures, dropped, pasted or chosen, and its text.

import { drawPicture, part, readPictures } from "./pictures.js";
import { say } from "./texts.js";

const $ = (id) => document.getElementById(id);
let pictures = [];
let show; // { enlarge, notice }

// The question and its pictures, which are no longer here then; null where there is neither.
export function takeQuestion() {
  const question = $("question").value.trim();
  if (!question && !pictures.length) return null;
  const taken = { question, pictures };
  $("question").value = "";
  pictures = [];
  draw();
  return taken;
}

async function add(files) {
  const refused = [];
  const read = await readPictures(files, (name) => refused.push(say("noPicture", { name })));
  pictures = [...pictures, ...read];
  show.notice(refused.join(" "));
  draw();
  $("question").focus();
}

function draw() {
  $("pictures").hidden = !pictures.length;
  $("pictures").replaceChildren(...pictures.map((picture) => part("li", "", drawPicture(picture, show), remover(picture))));
  grow();
}

function remover(picture) {
  const remove = part("button", "remove", "×");
  remove.type = "button";
  remove.setAttribute("aria-label", say("remove", { name: picture.name }));
  remove.addEventListener("click", () => {
    pictures = pictures.filter((each) => each !== picture);
    draw();
    $("question").focus();
  });
  return remove;
}

function grow() {
  $("question").style.height = "auto";
  $("question").style.height = `${Math.min($("question").scrollHeight, innerHeight / 3)}px`;
}

// <|ref|>the cat<|/ref|> is how DeepSeek-VL2 is asked for a box.
function mark() {
  const { selectionStart: start, selectionEnd: end, value } = $("question");
  $("question").setRangeText(`<|ref|>${value.slice(start, end)}<|/ref|>`, start, end, "end");
  if (start === end) $("question").setSelectionRange(start + 7, start + 7);
  $("question").focus();
}

export function listenToComposer(actions) {
  show = actions;
  $("question").addEventListener("input", grow);
  $("question").addEventListener("keydown", (event) => {
    // The Enter that ends the writing of a Chinese word is not ours.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("find").addEventListener("click", mark);
  for (const button of document.querySelectorAll("[data-choose]")) button.addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", async () => {
    await add([...$("files").files]);
    $("files").value = "";
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    if (clipboardData.files.length) add(clipboardData.files);
  });
  // Files are taken anywhere; text that is dragged goes where the browser puts it.
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("drop").hidden = true;
  });
  document.addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    add(event.dataTransfer.files);
  });
}
