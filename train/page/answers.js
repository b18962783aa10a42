"use strict";
// Shows the answers that the filters ask for, the worst by the chosen metric first. What they ask for stands in the address
// too: #show=wrong&metric=anls&find=red. The page is whole without this.
(() => {
  const list = document.getElementById("answers");
  const found = document.getElementById("found");
  const filters = ["show", "metric", "source", "find"].map((id) => document.getElementById(id)).filter(Boolean);
  const metric = document.getElementById("metric");
  const cards = [...list.children].map((element, place) => ({
    element,
    place,
    source: element.dataset.source,
    cut: "cut" in element.dataset,
    differ: "differ" in element.dataset,
    values: element.dataset.values.split(";").map((of) => of.split(",").map((value) => (value === "" ? null : Number(value)))),
    text: null,
  }));

  const isRight = (card, model, from) => {
    const value = card.values[model]?.[metric.selectedIndex] ?? null;
    return value === null ? null : value >= from;
  };

  const asked = {
    all: () => true,
    wrong: (card, a, b) => a === false || b === false,
    a: (card, a, b) => a === true && b === false,
    b: (card, a, b) => b === true && a === false,
    both: (card, a, b) => a === false && b === false,
    differ: (card) => card.differ,
    cut: (card) => card.cut,
  };

  const worth = (card) => Math.min(...card.values.map((of) => of[metric.selectedIndex] ?? 2));

  const sort = () => {
    const order = cards.map((card) => [worth(card), card]);
    order.sort(([one, a], [other, b]) => one - other || a.place - b.place);
    list.append(...order.map(([, card]) => card.element));
  };

  const filter = () => {
    const wanted = Object.fromEntries(filters.map((input) => [input.id, input.value]));
    const words = wanted.find.toLowerCase().split(/\s+/).filter(Boolean);
    const from = Number(metric.selectedOptions[0].dataset.from);
    let count = 0;
    for (const card of cards) {
      if (words.length) card.text ??= card.element.textContent.toLowerCase();
      const shown =
        asked[wanted.show](card, isRight(card, 0, from), isRight(card, 1, from)) &&
        (!wanted.source || card.source === wanted.source) &&
        words.every((word) => card.text.includes(word));
      card.element.hidden = !shown;
      count += shown;
    }
    found.textContent = `${count.toLocaleString("en")} of ${cards.length.toLocaleString("en")}`;
  };

  const remember = () => {
    const set = filters.filter((input) => input.value && !(input.tagName === "SELECT" && input.selectedIndex === 0));
    const hash = new URLSearchParams(set.map((input) => [input.id, input.value])).toString();
    history.replaceState(null, "", `#${hash}`);
  };

  const recall = () => {
    if (/^#q\d+$/.test(location.hash)) return; // a question's own address: the filters stay
    const asks = new URLSearchParams(location.hash.slice(1));
    for (const input of filters) {
      input.value = asks.get(input.id) ?? "";
      if (input.tagName === "SELECT" && input.selectedIndex < 0) input.selectedIndex = 0;
    }
    sort();
    filter();
  };

  for (const input of filters) {
    input.addEventListener("input", () => {
      if (input === metric) sort();
      filter();
      remember();
    });
  }
  addEventListener("hashchange", recall);
  sort();
  filter();
  recall();
})();
