"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const options = { responsive: true, displaylogo: false, displayModeBar: false };

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function axis(given) {
    const line = colour("--grid");
    const title = { font: { size: 13, color: colour("--soft") }, ...given.title };
    return { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, fixedrange: true, ...given, title };
  }

  function themed(chart) {
    return {
      ...chart.layout,
      height: chart.height,
      margin: { l: 8, r: 12, t: 8, b: 44 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      bargap: 0.35,
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      showlegend: false,
      xaxis: axis({ nticks: 6, tickangle: 0, ...chart.layout.xaxis }),
      yaxis: axis(chart.layout.yaxis),
    };
  }

  /** Marks that have no colour of their own are drawn like text. */
  function inked(trace) {
    const copy = structuredClone(trace);
    if (copy.error_x) copy.error_x.color = colour("--ink");
    if (copy.marker && copy.marker.symbol) copy.marker.color = copy.marker.line.color = colour("--ink");
    return copy;
  }

  function draw() {
    for (const chart of charts) {
      Plotly.react(chart.name, chart.data.map(inked), themed(chart), options);
    }
  }

  draw();
  dark.addEventListener("change", draw);
})();
