// What a transition did, per tag and device.
#include "pool/report.hpp"

namespace cumempool::pool {

cumempool_report_row& Report::row(const Record& record) {
  const char* tag = record.tag->name.c_str();
  for (cumempool_report_row& row : rows) {
    if (row.tag == tag && row.device == record.device) return row;
  }
  cumempool_report_row row{};
  row.size = sizeof row;
  row.tag = tag;
  row.device = record.device;
  rows.push_back(row);
  return rows.back();
}

}  // namespace cumempool::pool
