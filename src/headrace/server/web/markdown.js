// Markdown to DOM nodes. A model's output is never parsed as HTML: every character goes through textContent.
import { copy } from "/web/clipboard.js";

export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const INLINE = /(`+)([^]*?[^`])\1(?!`)|\*\*([^*]+(?:\*[^*]+)*?)\*\*|__([^_]+)__|\*([^*\s](?:[^*]*[^*\s])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;

function inline(text) {
  const nodes = [];
  let at = 0;
  for (const m of text.matchAll(INLINE)) {
    nodes.push(text.slice(at, m.index));
    if (m[2] !== undefined) nodes.push(element("code", { textContent: m[2].trim() }));
    else if (m[3] ?? m[4]) nodes.push(element("strong", {}, ...inline(m[3] ?? m[4])));
    else if (m[5]) nodes.push(element("em", {}, ...inline(m[5])));
    else nodes.push(element("a", { href: m[7], rel: "noopener noreferrer", target: "_blank", textContent: m[6] }));
    at = m.index + m[0].length;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

function codeBlock(source, language, labels) {
  const button = element("button", { type: "button", textContent: labels.copy });
  button.addEventListener("click", () => copy(source, button, labels));
  const code = element("code", { textContent: source });
  if (language) code.dataset.language = language;
  return element("div", { className: "code" }, element("pre", {}, code), button);
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const row = (tag, line) => element("tr", {}, ...cells(line).map((cell) => element(tag, {}, ...inline(cell))));
  return element("table", {}, element("thead", {}, row("th", lines[0])), element("tbody", {}, ...lines.slice(2).map((line) => row("td", line))));
}

function list(lines) {
  const ordered = /^\s*\d/.test(lines[0]);
  const top = element(ordered ? "ol" : "ul");
  if (ordered) top.start = parseInt(lines[0], 10);
  const indent = lines[0].match(/^\s*/)[0].length;
  for (let i = 0; i < lines.length; ) {
    const item = element("li", {}, ...inline(lines[i].replace(/^\s*(?:[-*+]|\d+[.)])\s+/, "")));
    const inner = [];
    for (i += 1; i < lines.length && lines[i].match(/^\s*/)[0].length > indent; i += 1) inner.push(lines[i]);
    if (inner.length) item.append(/^\s*(?:[-*+]|\d+[.)])\s/.test(inner[0]) ? list(inner) : element("p", {}, ...inline(inner.join(" ").trim())));
    top.append(item);
  }
  return top;
}

/** The nodes of a text; an unfinished code block is shown as one, so that text can stream. */
export function markdown(text, labels) {
  const nodes = [];
  const lines = text.split("\n");
  const item = /^\s*(?:[-*+]|\d+[.)])\s+\S/;
  for (let i = 0; i < lines.length; ) {
    const fence = lines[i].match(/^\s*(```+|~~~+)\s*([\w+#.-]*)/);
    if (fence) {
      const code = [];
      for (i += 1; i < lines.length && !lines[i].trim().startsWith(fence[1]); i += 1) code.push(lines[i]);
      i += 1;
      nodes.push(codeBlock(code.join("\n"), fence[2], labels));
    } else if (!lines[i].trim()) {
      i += 1;
    } else if (/^#{1,6}\s/.test(lines[i])) {
      const level = Math.min(4, lines[i].match(/^#+/)[0].length);
      nodes.push(element(`h${level}`, {}, ...inline(lines[i].replace(/^#+\s+/, ""))));
      i += 1;
    } else if (/^\s*(?:---+|\*\*\*+)\s*$/.test(lines[i])) {
      nodes.push(element("hr"));
      i += 1;
    } else if (lines[i].includes("|") && /^\s*\|?\s*:?-{2,}/.test(lines[i + 1] ?? "")) {
      const rows = [];
      for (; i < lines.length && lines[i].includes("|"); i += 1) rows.push(lines[i]);
      nodes.push(table(rows));
    } else if (item.test(lines[i])) {
      const items = [];
      for (; i < lines.length && (item.test(lines[i]) || /^\s{2,}\S/.test(lines[i])); i += 1) items.push(lines[i]);
      nodes.push(list(items));
    } else if (lines[i].startsWith(">")) {
      const quoted = [];
      for (; i < lines.length && lines[i].startsWith(">"); i += 1) quoted.push(lines[i].replace(/^>\s?/, ""));
      nodes.push(element("blockquote", {}, ...markdown(quoted.join("\n"), labels)));
    } else {
      const paragraph = [];
      for (; i < lines.length && lines[i].trim() && !/^\s*(```|~~~)|^#{1,6}\s|^>/.test(lines[i]) && !item.test(lines[i]); i += 1) paragraph.push(lines[i]);
      const node = element("p");
      paragraph.forEach((line, n) => node.append(...(n ? [element("br")] : []), ...inline(line)));
      nodes.push(node);
    }
  }
  return nodes;
}
