/* Light or dark: follows the system until the button is used. Not a module, so it runs before the first paint. Code that
   draws on a canvas listens to `themechange` on the document. */
(() => {
  const KEY = "headrace.theme";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  const kept = localStorage.getItem(KEY);
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;

  function show() {
    const button = document.getElementById("theme");
    if (button) {
      button.setAttribute("aria-pressed", String(isDark()));
      button.textContent = isDark() ? "☀" : "☾";
      button.title = isDark() ? "Light colours" : "Dark colours";
    }
    document.dispatchEvent(new Event("themechange"));
  }

  document.addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      localStorage.setItem(KEY, root.dataset.theme);
      show();
    });
  });
  system.addEventListener("change", show);
})();
