// The conversation as it is seen: each turn with its pictures, and below it one answer, or two side by side.

import { drawPicture, part } from "./pictures.js";
import { say } from "./texts.js";

// A label and its box; while it streams, a box that has only begun.
const GROUNDING = /<\|ref\|>(.*?)<\|\/ref\|>(?:\s*<\|det\|>.*?(?:<\|\/det\|>|$))?/gs;

// A turn: { element, answers: [an element with update()] }. `actions` are { enlarge, again, copy, curl }.
export function drawTurn(turn, turns, actions) {
  const pictures = part("div", "shown", ...turn.pictures.map((each) => drawPicture(each, actions)));
  const question = part("div", "question", part("h3", "unseen", say("you")), pictures);
  pictures.hidden = !turn.pictures.length;
  if (turn.question) question.append(part("p", "text", turn.question));
  const answers = turn.answers.map((answer, lane) => drawAnswer(answer, turns, actions, lane));
  const lanes = part("div", answers.length > 1 ? "answers two" : "answers", ...answers.map(({ element }) => element));
  return { element: part("li", "turn", question, lanes), answers };
}

function drawAnswer(answer, turns, actions, lane) {
  const text = part("div", "text");
  text.setAttribute("aria-live", "polite");
  const below = part("div", "below");
  const element = part("article", "answer", part("h3", "", answer.model), text, below);
  const update = () => {
    element.dataset.state = answer.state;
    text.setAttribute("aria-busy", String(answer.state === "running")); // a reader is told the whole answer, once
    text.replaceChildren(...(answer.text || answer.state !== "running" ? withLabels(answer) : [part("i", "soft", say("waiting"))]));
    below.replaceChildren(...(answer.state === "running" ? [] : ended(answer, turns, actions, lane)));
  };
  update();
  return { element, update };
}

// The text, always as text; a label in it that stands before a box gets the colour of the box, which has its numbers.
function withLabels({ text }) {
  const colourOf = colours(text);
  const pieces = [];
  let end = 0;
  for (const found of text.matchAll(GROUNDING)) {
    const label = part("mark", colourOf(found[1]), found[1]);
    label.title = found[0];
    pieces.push(text.slice(end, found.index), label);
    end = found.index + found[0].length;
  }
  return [...pieces, text.slice(end)].filter((piece) => piece !== "");
}

// One of six colours for each label of a text, by which it is found again on the picture.
function colours(text) {
  const labels = [...new Set([...text.matchAll(GROUNDING)].map(([, label]) => label.trim()))];
  return (label) => `c${Math.max(0, labels.indexOf(label.trim())) % 6}`;
}

function ended(answer, turns, actions, lane) {
  const shown = [];
  const note = (text, name = "note") => shown.push(part("p", name, text));
  if (answer.error) {
    const again = button("again", () => actions.again(answer));
    shown.push(part("div", "error", part("p", "", answer.error), again));
    shown[0].setAttribute("role", "alert");
  }
  shown.push(...drawBoxes(answer, turns, actions));
  if (answer.malformed) note(say("malformed", { count: answer.malformed }));
  if (answer.state === "stopped") note(say("stopped"));
  if (answer.state === "done" && !answer.text) note(say("empty"));
  if (answer.finish === "length") note(say("cut"));
  else if (answer.finish && answer.finish !== "stop") note(say("filtered", { reason: answer.finish }));
  const tools = part("div", "facts", part("span", "soft", facts(answer)));
  if (answer.text) tools.append(button("copy", (event) => actions.copy(answer, event)));
  tools.append(button("curl", (event) => actions.curl(answer, lane, event)));
  return [...shown, tools];
}

function facts({ usage, seconds }) {
  const found = [];
  if (usage) found.push(say("tokensIn", { prompt: usage.prompt_tokens, answer: usage.completion_tokens }));
  if (seconds) found.push(say("seconds", { seconds: seconds.toFixed(1) }));
  return found.join(" · ");
}

// The pictures on which the answer has boxes, and below them the boxes in numbers.
function drawBoxes({ text, boxes: found, turns: sent, turned }, turns, actions) {
  if (!found.length) return [];
  const colourOf = colours(text);
  const boxes = found.map((each) => ({ ...each, colour: colourOf(each.label) }));
  const pictures = sent.flatMap((index) => turns[index].pictures);
  const numbers = [...new Set(boxes.map(({ image }) => image))].sort((a, b) => a - b);
  const drawn = numbers.map((number) => {
    const mine = boxes.filter(({ image }) => image === number);
    const picture = pictures[number - 1];
    return picture ? part("div", "boxed", drawPicture(picture, { ...actions, boxes: mine, turned })) : "";
  });
  const list = part("ul", "boxes");
  list.setAttribute("aria-label", say("boxes"));
  for (const { label, box, colour } of boxes) {
    const values = box.map((value) => Math.round(value)).join(", ");
    list.append(part("li", "", part("mark", colour, label || "–"), ` ${values}`));
  }
  return [...drawn, list];
}

function button(name, press) {
  const element = part("button", "link", say(name));
  element.type = "button";
  element.addEventListener("click", press);
  return element;
}
