"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const PRINT_WIDTH = 660;
  // On paper always light: the values of the style's first rule.
  const light = (() => {
    const style = document.styleSheets[0].cssRules[0].style;
    return (name) => style.getPropertyValue(name).trim();
  })();
  const present = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let onPaper = false;

  // Names of colours, such as --ink, become their values.
  const painted = (value, colour) => {
    if (typeof value === "string") return /^--[a-z0-9]+$/.test(value) ? colour(value) : value;
    if (Array.isArray(value)) {
      return typeof value[0] === "object" || typeof value[1] === "string"
        ? value.map((each) => painted(each, colour)) : value;
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, colour)]));
  };
  const axis = {
    gridcolor: "--grid", zerolinecolor: "--grid", linecolor: "--axis", automargin: true,
    title: { standoff: 8 }, ticks: "outside", ticklen: 6, tickcolor: "rgba(0,0,0,0)",
  };
  const shared = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: "--ink", size: 13, family: "system-ui, Segoe UI, Roboto, DejaVu Sans, sans-serif" },
    margin: { l: 12, r: 12, t: 12, b: 12 }, xaxis: axis, yaxis: axis, hovermode: "closest",
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    hoverlabel: { bgcolor: "--panel", bordercolor: "--axis", font: { color: "--ink" } },
  };
  const draw = (key, width) => {
    const colour = onPaper ? light : present;
    const layout = { ...figures[key].layout, template: { layout: shared } };
    if (width) layout.width = width;
    return Plotly.react(key, painted(figures[key].data, colour), painted(layout, colour), {
      displayModeBar: false, responsive: !width, doubleClick: "reset",
    });
  };
  const keys = Object.keys(figures);
  const drawAll = (width) => {
    for (const key of keys) {
      const place = document.getElementById(key);
      const half = place.closest(".grid") ? PRINT_WIDTH / 2 - 12 : PRINT_WIDTH;
      draw(key, width ? half : 0);
    }
  };
  // One figure a turn, so that the page answers meanwhile.
  const next = () => {
    const key = keys[drawn];
    if (key === undefined) {
      document.documentElement.dataset.drawn = String(drawn);
      return;
    }
    draw(key);
    drawn += 1;
    setTimeout(next, 0);
  };
  let drawn = 0;
  next();
  dark.addEventListener("change", () => drawAll(0));
  addEventListener("beforeprint", () => { onPaper = true; drawAll(PRINT_WIDTH); });
  addEventListener("afterprint", () => { onPaper = false; drawAll(0); });
})();
