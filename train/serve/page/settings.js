// What is asked for with every question, and the key of the service: two dialogs, and what the browser keeps of them.

import { apiKey, keepApiKey } from "./service.js";

const PLACE = "settings"; // in localStorage
const $ = (id) => document.getElementById(id);

// { system, temperature, tokens, models: [left, right], compare }
export function settings() {
  const unset = { system: "", temperature: 0, tokens: null, models: [], compare: false };
  try {
    return { ...unset, ...JSON.parse(localStorage.getItem(PLACE)) };
  } catch {
    return unset;
  }
}

export function keepSettings(changed) {
  localStorage.setItem(PLACE, JSON.stringify({ ...settings(), ...changed }));
}

export function listenToSettings() {
  const dialog = $("settings");
  $("open-settings").addEventListener("click", () => {
    const { system, temperature, tokens } = settings();
    $("system").value = system;
    $("temperature").value = temperature;
    $("tokens").value = tokens ?? "";
    dialog.returnValue = "";
    dialog.showModal();
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "done") return;
    const tokens = $("tokens").valueAsNumber || null;
    keepSettings({ system: $("system").value.trim(), temperature: $("temperature").valueAsNumber, tokens });
  });
}

// Asks for the key, and then does what was refused without it.
export function askForKey(then) {
  const dialog = $("key");
  dialog.onclose = () => {
    if (dialog.returnValue !== "done") return;
    keepApiKey($("key-value").value.trim());
    then();
  };
  dialog.returnValue = "";
  $("key-value").value = apiKey();
  if (!dialog.open) dialog.showModal();
}
