// The service as the page asks it: /v1/models and /v1/chat/completions with a streamed answer.

import { say } from "./texts.js";

const KEY = "api-key"; // in sessionStorage: gone with the tab

export class ServiceError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export const keepApiKey = (value) => sessionStorage.setItem(KEY, value);

function headers() {
  return apiKey() ? { Authorization: `Bearer ${apiKey()}` } : {};
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(say("out"));
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

// What a response that is no answer means, in words.
async function refusal(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not OpenAI's form: something between the page and the service answered
  }
  if (response.status === 429) {
    const seconds = response.headers.get("Retry-After") ?? "1";
    return new ServiceError(say("busy", { seconds }), 429);
  }
  if (response.status === 503) return new ServiceError(say("ending"), 503);
  return new ServiceError(say(response.status < 500 ? "refused" : "failed", { message }), response.status);
}

export async function models() {
  const answer = await (await call("v1/models")).json();
  return answer.data;
}

// The body of a request; the page sends it streamed, `curl` takes it as it is.
export function body(model, messages, settings) {
  const wanted = { model, messages, temperature: settings.temperature };
  if (settings.tokens) wanted.max_tokens = settings.tokens;
  return wanted;
}

// Asks, and tells of each piece as it comes: onPiece({ text, boxes, usage, finish }), only what the piece has.
export async function ask(wanted, signal, onPiece) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...wanted, stream: true, stream_options: { include_usage: true } }),
  });
  for await (const event of events(response.body)) {
    if (event === "[DONE]") return;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new ServiceError(say("failed", { message: chunk.error.message }));
    const choice = chunk.choices?.[0] ?? {};
    onPiece({
      text: choice.delta?.content ?? "",
      finish: choice.finish_reason ?? null,
      usage: chunk.usage ?? null,
      boxes: choice.delta?.boxes ?? choice.boxes ?? chunk.boxes ?? null,
      malformed: choice.delta?.malformed_boxes ?? choice.malformed_boxes ?? chunk.malformed_boxes ?? 0,
    });
  }
  throw new ServiceError(say("broken"));
}

// The data of each server-sent event of a stream.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError(say("broken"));
    }
    if (piece.done) return;
    text += piece.value.replaceAll("\r\n", "\n");
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
