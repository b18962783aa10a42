"use strict";
// The bad rows: a page of them at a time, those that hold every word of the filter. Texts are set as text, never as HTML.
(() => {
  const source = document.getElementById("bad-rows");
  if (!source) return;
  const { files, rows } = JSON.parse(source.textContent);
  const list = document.getElementById("rows");
  const more = document.getElementById("more");
  const found = document.getElementById("found");
  const input = document.getElementById("filter");
  const PAGE = 50;
  const texts = rows.map(([file, row, where, problem]) => `${files[file]}, row ${row} ${where} ${problem}`.toLowerCase());
  let matching = [];
  let shown = 0;

  const part = (tag, name, ...children) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...children);
    return element;
  };

  const item = ([file, row, where, problem]) =>
    part(
      "li",
      "",
      part("span", "where", part("bdi", "", files[file]), `, row ${row}`),
      part("code", "", part("bdi", "", where)),
      part("span", "problem", part("bdi", "", problem)),
    );

  const show = () => {
    list.append(...matching.slice(shown, shown + PAGE).map((index) => item(rows[index])));
    shown = Math.min(shown + PAGE, matching.length);
    more.hidden = shown === matching.length;
    more.textContent = `Show ${Math.min(PAGE, matching.length - shown)} more of ${(matching.length - shown).toLocaleString("en")}`;
  };

  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    matching = rows.map((_, index) => index).filter((index) => words.every((word) => texts[index].includes(word)));
    found.textContent = `${matching.length.toLocaleString("en")} ${matching.length === 1 ? "row" : "rows"}`;
    list.replaceChildren();
    shown = 0;
    show();
  };

  input.addEventListener("input", filter);
  more.addEventListener("click", show);
  filter();
})();
