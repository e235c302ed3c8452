"use strict";
// Draws the page's charts with Plotly, which the page holds packed. Without this script, or in a browser that cannot
// unpack gzip (before 2023), the tables below the charts stay open and show the values.

const dark = matchMedia("(prefers-color-scheme: dark)");

function template() {
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, line, paper] = ["--ink", "--muted", "--line", "--paper"].map((name) => style.getPropertyValue(name));
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: muted, tickcolor: muted, tickfont: { color: muted } };
  return {
    layout: {
      font: { color: ink, family: getComputedStyle(document.body).fontFamily, size: 12 },
      paper_bgcolor: paper,
      plot_bgcolor: paper,
      hoverlabel: { bgcolor: paper, bordercolor: muted, font: { color: ink } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
      xaxis: axis,
      yaxis: axis,
    },
  };
}

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (char) => char.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
}

async function draw() {
  await loadPlotly();
  const plots = [];
  document.documentElement.classList.add("drawn");
  for (const chart of document.querySelectorAll(".chart")) {
    const { data, layout } = JSON.parse(chart.querySelector("script").textContent);
    const plot = chart.querySelector(".plot");
    const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };
    await Plotly.newPlot(plot, data, { ...layout, template: template() }, config);
    chart.querySelector("details").open = false;
    plots.push(plot);
  }
  dark.addEventListener("change", () => plots.forEach((plot) => Plotly.relayout(plot, { template: template() })));
}

draw();
