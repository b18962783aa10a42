// A request as a command for bash, and the clipboard.

import { apiKey } from "./service.js";

// The body is one line of JSON on standard input: an argument of a command may have 128 kB, a photograph has more, and
// between quoted EOF marks bash changes nothing.
export function curlCommand(wanted) {
  const url = new URL("v1/chat/completions", document.baseURI).href;
  const key = apiKey() ? ` -H "Authorization: Bearer $API_KEY"` : "";
  return `curl -sS '${url.replaceAll("'", "%27")}' -H 'Content-Type: application/json'${key} --data-binary @- <<'EOF'\n${JSON.stringify(wanted)}\nEOF\n`;
}

// Copies a text; without https the clipboard's own interface is missing, and the old way is taken.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}
