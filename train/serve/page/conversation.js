// The conversation: turns of a question with its pictures and the answers of one or two models, kept over a reload.
//
//   turn    { question, pictures: [{ name, uri }], answers: [answer, answer] }
//   answer  { model, text, state: "running" | "done" | "stopped" | "failed", error, boxes, malformed, usage, finish,
//             seconds, turns: [index of each turn that was sent] }

const DATABASE = "conversations";
const STORE = "tabs";
const DAY = 24 * 3600 * 1000; // a tab that was closed is forgotten after it

// The messages of a request for `lane` (0 left, 1 right): what this lane was answered, where it was not, what the other was.
// A turn without an answer is left out. Returns the messages and the indices of the turns in them.
export function messagesFor(turns, last, lane, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  const sent = [];
  turns.slice(0, last + 1).forEach((turn, index) => {
    const answer = turn.answers[lane] ?? turn.answers[0];
    if (index < last && !(answer?.text && answer.state !== "running")) return;
    messages.push({ role: "user", content: parts(turn) });
    if (index < last) messages.push({ role: "assistant", content: answer.text });
    sent.push(index);
  });
  return { messages, sent };
}

function parts(turn) {
  if (!turn.pictures.length) return turn.question;
  const images = turn.pictures.map(({ uri }) => ({ type: "image_url", image_url: { url: uri } }));
  return turn.question ? [...images, { type: "text", text: turn.question }] : images;
}

function tab() {
  if (!sessionStorage.getItem("tab")) sessionStorage.setItem("tab", `${Date.now()}-${Math.random().toString(36).slice(2)}`);
  return sessionStorage.getItem("tab");
}

function request(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

async function store(mode) {
  const opening = indexedDB.open(DATABASE, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(STORE);
  const database = await request(opening);
  const transaction = database.transaction(STORE, mode);
  transaction.oncomplete = () => database.close();
  return transaction.objectStore(STORE);
}

// Whether it could be kept: photographs are large, and a private window may keep nothing.
export async function keep(turns) {
  const name = tab();
  try {
    await request((await store("readwrite")).put({ turns, at: Date.now() }, name));
    return true;
  } catch {
    return false;
  }
}

// At once, whatever is still being kept: the tab takes another name.
export async function forget() {
  const name = tab();
  sessionStorage.removeItem("tab");
  try {
    await request((await store("readwrite")).delete(name));
  } catch {
    // nothing was kept
  }
}

// The turns of this tab; those of tabs that were closed a day ago are removed.
export async function restore() {
  try {
    const found = await store("readwrite");
    const [keys, values] = await Promise.all([request(found.getAllKeys()), request(found.getAll())]);
    keys.forEach((key, index) => {
      if (key !== tab() && Date.now() - values[index].at > DAY) found.delete(key);
    });
    const turns = values[keys.indexOf(tab())]?.turns ?? [];
    for (const answer of turns.flatMap((turn) => turn.answers)) if (answer.state === "running") answer.state = "stopped";
    return turns;
  } catch {
    return [];
  }
}
