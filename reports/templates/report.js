"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  for (const place of document.querySelectorAll("[data-chart]")) {
    // Vega names what it draws into in its own words; ours are on the element around it.
    // The expressions of a chart are interpreted (ast), so the page needs no `eval`.
    window
      .vegaEmbed(place, charts[place.dataset.chart], { actions: false, renderer: "svg", ast: true })
      .then(() => (place.dataset.drawn = "yes"))
      .catch((error) => {
        place.textContent = "The chart could not be drawn; its text is below.";
        console.error(error);
      });
  }

  const key = (row, column) => {
    const text = row.children[column].dataset.sort;
    const number = text === "-inf" ? -Infinity : Number(text);
    return text === "" || Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a === b ? 0 : a < b ? -1 : 1;
    return String(a).localeCompare(String(b));
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => compare(key(a, column), key(b, column)) * (down ? -1 : 1));
        table.tBodies[0].append(...rows);
      });
    });
  }
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
