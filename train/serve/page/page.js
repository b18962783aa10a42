// The page: choose models, ask, watch, stop, go on.

import { drawTurn } from "./answers.js";
import { listenToComposer, takeQuestion } from "./composer.js";
import { forget, keep, messagesFor, restore } from "./conversation.js";
import { copy, curlCommand } from "./curl.js";
import { apiKey, ask, body, models } from "./service.js";
import { askForKey, keepSettings, listenToSettings, settings } from "./settings.js";
import { fillTexts, say, sizeOf } from "./texts.js";

const $ = (id) => document.getElementById(id);
const LANES = [$("model-0"), $("model-1")];

let turns = [];
let served = []; // what /v1/models says
let running = []; // an AbortController for each answer that streams
const views = new WeakMap(); // an answer to what draws it anew

async function listModels() {
  try {
    served = await models();
  } catch (error) {
    if (error.status === 401) askForKey(listModels);
    return notice(error.message);
  }
  const names = served.map(({ id }) => id);
  const kept = settings();
  LANES.forEach((select, lane) => {
    select.replaceChildren(...names.map((name) => new Option(name)));
    select.value = names.includes(kept.models[lane]) ? kept.models[lane] : (names[lane] ?? names[0]);
  });
  $("compare").hidden = names.length < 2;
  compareBy(names.length > 1 && kept.compare);
  const rehearsed = served.filter((each) => each.rehearsal).map(({ id }) => say("rehearsal", { model: id }));
  notice(names.length ? rehearsed.join(" ") : say("noModels"));
}

function compareBy(both) {
  $("against").hidden = !both;
  $("compare").setAttribute("aria-pressed", String(both));
  document.body.classList.toggle("both", both);
}

function keepModels() {
  keepSettings({ models: LANES.map(({ value }) => value), compare: !$("against").hidden });
}

function send() {
  if (running.length || !served.length) return;
  const asked = takeQuestion();
  if (!asked) return;
  const names = LANES.slice(0, $("against").hidden ? 1 : 2).map(({ value }) => value);
  const turn = { ...asked, answers: names.map(newAnswer) };
  turns.push(turn);
  draw(turn).scrollIntoView({ block: "start" });
  turn.answers.forEach(stream);
  keep(turns); // a reload before the answer's end loses the answer only
}

function newAnswer(model) {
  const turned = served.find(({ id }) => id === model)?.exif_orientation === "rotate";
  const unset = { text: "", error: "", boxes: [], malformed: 0, usage: null, finish: null, seconds: 0, turns: [] };
  return { model, turned, state: "running", ...unset };
}

function request(answer, lane) {
  const last = turns.findIndex((turn) => turn.answers.includes(answer));
  const wanted = settings();
  const { messages, sent } = messagesFor(turns, last, lane, wanted.system);
  answer.turns = sent;
  return body(answer.model, messages, wanted);
}

async function stream(answer, lane) {
  const control = new AbortController();
  running.push(control);
  drawButtons();
  const started = performance.now();
  let drawing = 0;
  try {
    await ask(request(answer, lane), control.signal, (piece) => {
      answer.text += piece.text;
      answer.boxes = piece.boxes ?? answer.boxes;
      answer.malformed = piece.malformed || answer.malformed;
      answer.usage = piece.usage ?? answer.usage;
      answer.finish = piece.finish ?? answer.finish;
      drawing ||= requestAnimationFrame(() => {
        drawing = 0;
        follow(answer);
      });
    });
    answer.state = "done";
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    answer.error = answer.state === "failed" ? error.message : "";
    if (error.status === 401) askForKey(() => again(answer));
  }
  cancelAnimationFrame(drawing);
  answer.seconds = (performance.now() - started) / 1000;
  running = running.filter((each) => each !== control);
  follow(answer);
  drawButtons();
  if (!running.length && turns.length && !(await keep(turns))) notice(say("notKept"));
}

// Draws, and stays at the end of the page where the reader is there.
function follow(answer) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  views.get(answer)();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function again(answer) {
  const turn = turns.find(({ answers }) => answers.includes(answer));
  if (!turn) return;
  const lane = turn.answers.indexOf(answer);
  turn.answers[lane] = newAnswer(answer.model);
  draw(turn);
  stream(turn.answers[lane], lane);
}

function stop() {
  for (const control of running) control.abort();
}

async function copyAnswer(answer) {
  status(say((await copy(answer.text)) ? "copied" : "notCopied"));
}

async function copyCurl(answer, lane) {
  const command = curlCommand(request(answer, lane));
  const about = command.length > 1e5 ? [say("large", { size: sizeOf(command.length) })] : [];
  if (apiKey()) about.push(say("needsKey"));
  status((await copy(command)) ? [say("copiedCurl"), ...about].join(" ") : say("notCopied"));
}

function draw(turn) {
  const drawn = drawTurn(turn, turns, { enlarge, again, copy: copyAnswer, curl: copyCurl });
  const old = $("turns").children[turns.indexOf(turn)];
  if (old) old.replaceWith(drawn.element);
  else $("turns").append(drawn.element);
  drawn.answers.forEach(({ update }, lane) => views.set(turn.answers[lane], update));
  drawButtons();
  return drawn.element;
}

function drawButtons() {
  $("welcome").hidden = turns.length > 0;
  $("clear").disabled = !turns.length;
  $("send").hidden = running.length > 0;
  $("stop").hidden = !running.length;
}

function enlarge(picture) {
  $("large").querySelector(".canvas")?.remove();
  $("large").prepend(picture);
  $("large").showModal();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function status(text) {
  $("said").textContent = text;
  $("said").classList.add("toast");
  clearTimeout(status.timer);
  status.timer = setTimeout(() => $("said").classList.remove("toast"), 4000);
}

function clear() {
  if (!confirm(say("askClear"))) return;
  stop();
  turns = [];
  $("turns").replaceChildren();
  drawButtons();
  forget();
  $("question").focus();
}

fillTexts();
listenToSettings();
listenToComposer({ enlarge, notice });
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", clear);
$("compare").addEventListener("click", () => {
  compareBy($("against").hidden);
  keepModels();
});
for (const select of LANES) select.addEventListener("change", keepModels);
document.addEventListener("keydown", ({ key }) => {
  if (key === "Escape" && !document.querySelector("dialog[open]")) stop();
});
listModels();
turns = await restore();
for (const turn of turns) draw(turn);
drawButtons();
$("turns").lastElementChild?.scrollIntoView();
