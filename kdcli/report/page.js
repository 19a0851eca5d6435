"use strict";
// Tables sort by a click on a column's head: numbers by their value, the rest as text; rows without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const numbers = [...body.rows].some((row) => row.cells[column].classList.contains("number"));
      const value = (row) => {
        const cell = row.cells[column];
        const given = cell.dataset.value ?? cell.textContent.trim();
        return numbers ? parseFloat(given) : given;
      };
      const empty = (x) => x === "" || x === "-" || Number.isNaN(x);
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => {
        if (empty(a) || empty(b)) return empty(a) - empty(b);
        const order = numbers ? a - b : a.localeCompare(b);
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
// A click on a legend's entry hides and shows what it names, in the legend's own figure.
for (const button of document.querySelectorAll("button[data-toggle]")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    const part = button.closest(".titled") ?? button.closest("figure");
    for (const series of part.querySelectorAll(".series")) {
      if (series.dataset.series === button.dataset.toggle) series.classList.toggle("hidden", !on);
    }
  });
}
