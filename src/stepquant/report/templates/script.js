"use strict";
document.documentElement.classList.add("js");

// Sliders set a property of the gallery.
const gallery = document.getElementById("gallery");
for (const input of document.querySelectorAll("input[data-property]")) {
  const apply = () => gallery.style.setProperty(input.dataset.property, input.value + input.dataset.unit);
  input.addEventListener("input", apply);
  apply(); // a reloaded page can keep the slider's position
}

// Radio buttons with a class switch it on their section while they are checked.
for (const input of document.querySelectorAll("input[data-class]")) {
  const apply = () => {
    const on = document.querySelector(`input[name="${input.name}"]:checked`).dataset.class;
    input.closest("section").classList.toggle(input.dataset.class, on === input.dataset.class);
  };
  for (const one of document.getElementsByName(input.name)) one.addEventListener("change", apply);
  apply();
}

// A select, or a click on a row of the map, shows one of several curves.
const select = document.getElementById("curve");
if (select) {
  const show = () => {
    for (const figure of document.querySelectorAll("figure[data-curve]")) {
      figure.hidden = figure.dataset.curve !== select.value;
    }
    for (const row of document.querySelectorAll("#map tr[data-curve]")) {
      row.classList.toggle("selected", row.dataset.curve === select.value);
    }
  };
  select.addEventListener("change", show);
  for (const row of document.querySelectorAll("#map tr[data-curve]")) {
    row.addEventListener("click", () => {
      select.value = row.dataset.curve;
      show();
      document.querySelector("figure[data-curve]:not([hidden])").scrollIntoView({ block: "nearest" });
    });
  }
  show();
}

// Tables: a button in each column head. Cells without a value stay last.
const compare = (a, b) => {
  const numbers = [Number(a), Number(b)];
  return numbers.some(Number.isNaN) ? a.localeCompare(b, "en", { numeric: true }) : numbers[0] - numbers[1];
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [left, right] = [value(a), value(b)];
        if (left === "" || right === "") return (left === "") - (right === "");
        return up ? compare(left, right) : compare(right, left);
      });
      table.tBodies[0].append(...rows);
    });
  });
}
