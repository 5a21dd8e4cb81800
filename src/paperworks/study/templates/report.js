"use strict";
// In the head: the language is settled before anything is drawn. The page also reads without this script, in English.
const root = document.documentElement;
const store = { get() { try { return localStorage.getItem("paperworks-language"); } catch { return null; } },
                set(v) { try { localStorage.setItem("paperworks-language", v); } catch { /* a file may have no storage */ } } };
root.classList.remove("without-script");
root.lang = store.get() || ((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");

function translate() {
  for (const name of ["alt", "aria-label"])
    for (const e of document.querySelectorAll(`[data-en-${name}]`)) e.setAttribute(name, e.getAttribute(`data-${root.lang}-${name}`));
  document.title = document.querySelector("title").dataset[root.lang] || document.title;
}

function sortBy(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const before = head.getAttribute("aria-sort");
  const up = before ? before === "descending" : head.dataset.first !== "descending";
  const value = row => { const c = row.cells[column]; return c ? (c.dataset.v ?? c.textContent).replaceAll(",", "") : ""; };
  const rows = [...body.rows].map(row => ({ row, text: value(row), number: parseFloat(value(row)) }));
  const order = new Intl.Collator(undefined, { numeric: true });
  rows.sort((a, b) => {
    if (column === 0) return (up ? 1 : -1) * order.compare(a.text, b.text);
    if (isNaN(a.number) || isNaN(b.number)) return isNaN(a.number) - isNaN(b.number);  // what has no number stays below
    return (up ? 1 : -1) * (a.number - b.number);
  });
  body.append(...rows.map(r => r.row));
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
}

async function copy(button) {
  const command = button.closest(".command"), code = command.querySelector("code");
  try { await navigator.clipboard.writeText(code.textContent); }
  catch { getSelection().selectAllChildren(code); document.execCommand("copy"); }
  command.querySelector("[role=status]").textContent = root.lang === "zh" ? "已复制" : "copied";
}

function light(button) {
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  const lit = new Set([...document.querySelectorAll("[data-key][aria-pressed=true]")].map(b => b.dataset.key));
  for (const chart of document.querySelectorAll(".chart")) chart.classList.toggle("dim", lit.size > 0);
  for (const e of document.querySelectorAll("[data-series]")) e.classList.toggle("lit", lit.has(e.dataset.series));
}

let shown = null;
function zoom(button) {
  shown = button;
  const image = button.querySelector("img"), dialog = document.querySelector("dialog");
  dialog.querySelector("img").src = image.src;
  dialog.querySelector("img").alt = image.alt;
  dialog.querySelector("p").textContent = image.alt;
  if (!dialog.open) dialog.showModal();
}
function step(by) {
  const all = [...shown.closest(".strip").querySelectorAll("button")].filter(b => b.offsetParent);
  zoom(all[(all.indexOf(shown) + by + all.length) % all.length]);
}

document.addEventListener("DOMContentLoaded", () => {
  translate();
  document.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.matches(".language")) { root.lang = root.lang === "zh" ? "en" : "zh"; store.set(root.lang); translate(); }
    else if (button.matches("th button")) sortBy(button.parentElement);
    else if (button.matches(".command .copy")) copy(button);
    else if (button.matches("[data-key]")) light(button);
    else if (button.matches(".strip button")) zoom(button);
    else if (button.matches("dialog button")) step(Number(button.dataset.step));
  });
  const dialog = document.querySelector("dialog");
  dialog?.addEventListener("keydown", event => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  dialog?.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));
