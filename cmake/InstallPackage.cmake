# Installs the library, its headers, and the CMake package that exports cumempool::cumempool. The
# layout is the same under any prefix; in a wheel that prefix is the Python package's own folder.
if(DEFINED SKBUILD)
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_INCLUDEDIR include)
endif()
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

add_library(cumempool::cumempool ALIAS cumempool)
target_include_directories(
  cumempool INTERFACE "$<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/include>"
                      "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/cumempool")
install(TARGETS cumempool EXPORT cumempoolTargets LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(DIRECTORY include/cumempool DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.h")
install(EXPORT cumempoolTargets NAMESPACE cumempool:: DESTINATION "${package_dir}")

configure_package_config_file(cmake/cumempoolConfig.cmake.in cumempoolConfig.cmake
                              INSTALL_DESTINATION "${package_dir}")
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(cumempoolConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/cumempoolConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/cumempoolConfigVersion.cmake"
        DESTINATION "${package_dir}")
