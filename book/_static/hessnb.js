/* What the theme leaves out for readers with a keyboard or a screen reader. */
(() => {
  "use strict";

  // Whatever scrolls sideways can be reached by the keyboard, as long as it scrolls.
  const reach = () => {
    for (const box of document.querySelectorAll("main table.table, main .highlight pre, main div.math")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };

  document.addEventListener("DOMContentLoaded", () => {
    for (const summary of document.querySelectorAll(".bd-sidebar-primary details > summary")) {
      const page = summary.closest("li").querySelector("a").textContent.trim();
      summary.setAttribute("aria-label", `Pages below ${page}`);
    }
    // A list whose entries are no list items says nothing.
    for (const entry of document.querySelectorAll(".citation-list > .citation")) entry.setAttribute("role", "listitem");
    reach();
    for (const details of document.querySelectorAll("main details")) details.addEventListener("toggle", reach);
  });
  window.addEventListener("load", () => {
    reach();
    window.MathJax?.startup?.promise?.then(reach);
  });
  window.addEventListener("resize", reach);
})();
